// SPDX-License-Identifier: MIT OR Apache-2.0
//! Events as JSON and back; `docs/output.md` describes the shape.

use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use anyhow::{Context, Result, bail};
use serde_json::{Map, Value, json};

use super::event::{Event, Kind, Message, hex, tcprst_reason};

impl Event {
    pub fn to_json(&self) -> Value {
        let mut object = Map::new();
        let common = json!({
            "event": self.kind.name(),
            "time": self.time.to_string(),
            "device": self.device,
            "direction": self.direction.name(),
            "source": self.source.ip().to_string(),
            "source_port": self.source.port(),
            "destination": self.destination.ip().to_string(),
            "destination_port": self.destination.port(),
            "chain": self.chain,
            "connection": self.connection.map(hex),
        });
        for part in [common, members(&self.kind)] {
            if let Value::Object(part) = part {
                object.extend(part);
            }
        }
        object.into()
    }

    /// Reads what [`Event::to_json`] makes.
    ///
    /// # Errors
    /// A member is missing or wrong, or the event is not known.
    pub fn from_json(value: &Value) -> Result<Event> {
        let object = Members(value);
        Ok(Event {
            time: object.parsed("time")?,
            device: object.text("device")?.to_owned(),
            direction: object.parsed("direction")?,
            source: object.end("source", "source_port")?,
            destination: object.end("destination", "destination_port")?,
            chain: object
                .optional("chain", Members::text)?
                .map(ToOwned::to_owned),
            connection: object.optional("connection", Members::hex)?,
            kind: kind(&object)?,
        })
    }
}

impl Message {
    pub fn to_json(&self) -> Value {
        match self {
            Message::Event(event) => event.to_json(),
            Message::Lost(count) => json!({ "event": "lost", "count": count }),
        }
    }

    /// Reads what [`Message::to_json`] makes.
    ///
    /// # Errors
    /// As [`Event::from_json`].
    pub fn from_json(value: &Value) -> Result<Message> {
        let object = Members(value);
        match object.text("event")? {
            "lost" => object.number("count").map(Message::Lost),
            _ => Event::from_json(value).map(Message::Event),
        }
    }
}

/// The members that are an event's own.
fn members(kind: &Kind) -> Value {
    match kind {
        Kind::MpCapable {
            stage,
            version,
            flags,
            checksum_required,
        } => json!({
            "stage": stage.name(),
            "version": version,
            "flags": flags,
            "checksum_required": checksum_required,
        }),
        Kind::MpJoin {
            stage,
            address_id,
            backup,
            token,
            nonce,
        } => json!({
            "stage": stage.name(),
            "address_id": address_id,
            "backup": backup,
            "token": token.map(hex),
            "nonce": nonce.map(hex),
        }),
        Kind::AddAddr {
            address_id,
            address,
            port,
            echo,
            hmac,
            length,
        } => json!({
            "address_id": address_id,
            "address": address.to_string(),
            "port": port,
            "echo": echo,
            "hmac": hmac,
            "length": length,
        }),
        Kind::RemoveAddr { address_ids } => json!({ "address_ids": address_ids }),
        Kind::MpPrio { backup, address_id } => {
            json!({ "backup": backup, "address_id": address_id })
        }
        Kind::MpFail { data_sequence } => json!({ "data_sequence": data_sequence.to_string() }),
        Kind::MpFastclose => json!({}),
        Kind::MpTcprst { flags, reason } => json!({
            "flags": flags,
            "transient": flags & 1 != 0,
            "reason": reason,
            "reason_name": tcprst_reason(*reason),
        }),
        Kind::DataFin { data_sequence } => {
            json!({ "data_sequence": data_sequence.map(|number| number.to_string()) })
        }
        Kind::Fallback { cause } => json!({ "cause": cause.name() }),
        Kind::Close { how } => json!({ "how": how.name() }),
    }
}

fn kind(object: &Members<'_>) -> Result<Kind> {
    Ok(match object.text("event")? {
        "mp_capable" => Kind::MpCapable {
            stage: object.parsed("stage")?,
            version: object.number("version")?,
            flags: object.number("flags")?,
            checksum_required: object.bool("checksum_required")?,
        },
        "mp_join" => Kind::MpJoin {
            stage: object.parsed("stage")?,
            address_id: object.optional("address_id", Members::number)?,
            backup: object.optional("backup", Members::bool)?,
            token: object.optional("token", Members::hex)?,
            nonce: object.optional("nonce", Members::hex)?,
        },
        "add_addr" => Kind::AddAddr {
            address_id: object.number("address_id")?,
            address: object.parsed("address")?,
            port: object.optional("port", Members::number)?,
            echo: object.bool("echo")?,
            hmac: object.bool("hmac")?,
            length: object.number("length")?,
        },
        "remove_addr" => Kind::RemoveAddr {
            address_ids: object
                .get("address_ids")?
                .as_array()
                .and_then(|ids| ids.iter().map(byte).collect())
                .context("\"address_ids\" is no list of numbers up to 255")?,
        },
        "mp_prio" => Kind::MpPrio {
            backup: object.bool("backup")?,
            address_id: object.optional("address_id", Members::number)?,
        },
        "mp_fail" => Kind::MpFail {
            data_sequence: object.parsed("data_sequence")?,
        },
        "mp_fastclose" => Kind::MpFastclose,
        "mp_tcprst" => Kind::MpTcprst {
            flags: object.number("flags")?,
            reason: object.number("reason")?,
        },
        "data_fin" => Kind::DataFin {
            data_sequence: object.optional("data_sequence", Members::parsed)?,
        },
        "fallback" => Kind::Fallback {
            cause: object.parsed("cause")?,
        },
        "close" => Kind::Close {
            how: object.parsed("how")?,
        },
        other => bail!("an event {other:?} is not known"),
    })
}

fn byte(value: &Value) -> Option<u8> {
    value.as_u64().and_then(|value| value.try_into().ok())
}

/// An object whose members are asked for by name and type.
struct Members<'a>(&'a Value);

impl<'a> Members<'a> {
    fn get(&self, name: &str) -> Result<&'a Value> {
        self.0
            .get(name)
            .with_context(|| format!("no member {name:?}"))
    }

    fn text(&self, name: &str) -> Result<&'a str> {
        let value = self.get(name)?;
        value
            .as_str()
            .with_context(|| format!("{name:?} is no text: {value}"))
    }

    fn bool(&self, name: &str) -> Result<bool> {
        let value = self.get(name)?;
        value
            .as_bool()
            .with_context(|| format!("{name:?} is no bool: {value}"))
    }

    fn number<T: TryFrom<u64>>(&self, name: &str) -> Result<T> {
        let value = self.get(name)?;
        let number = value.as_u64().and_then(|number| T::try_from(number).ok());
        number.with_context(|| format!("{name:?} is no such number: {value}"))
    }

    fn parsed<T>(&self, name: &str) -> Result<T>
    where
        T: FromStr,
        Result<T, T::Err>: Context<T, T::Err>,
    {
        let parsed = self.text(name)?.parse();
        parsed.with_context(|| format!("read {name:?}"))
    }

    fn hex(&self, name: &str) -> Result<u32> {
        let text = self.text(name)?;
        u32::from_str_radix(text, 16).with_context(|| format!("read {name:?}"))
    }

    fn optional<T>(&self, name: &str, read: fn(&Self, &str) -> Result<T>) -> Result<Option<T>> {
        match self.0.get(name) {
            None | Some(Value::Null) => Ok(None),
            Some(_) => read(self, name).map(Some),
        }
    }

    fn end(&self, address: &str, port: &str) -> Result<SocketAddr> {
        let address: IpAddr = self.parsed(address)?;
        Ok((address, self.number(port)?).into())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::super::event::tests::samples;
    use super::*;

    #[test]
    fn there_and_back() {
        for event in samples() {
            let json = event.to_json();
            assert_eq!(Event::from_json(&json).unwrap(), event, "{json}");
            let message = Message::Event(event);
            let text = message.to_json().to_string();
            let read = serde_json::from_str(&text).unwrap();
            assert_eq!(Message::from_json(&read).unwrap(), message);
        }
        let lost = Message::Lost(3);
        assert_eq!(lost.to_json().to_string(), r#"{"event":"lost","count":3}"#);
        assert_eq!(Message::from_json(&lost.to_json()).unwrap(), lost);
    }

    #[test]
    fn the_shape() {
        let join = &samples()[2];
        assert_eq!(
            join.to_json().to_string(),
            "{\"event\":\"mp_join\",\"time\":\"2025-01-01T00:00:00.001002003Z\",\
             \"device\":\"path1\",\"direction\":\"out\",\"source\":\"10.0.1.1\",\
             \"source_port\":40000,\"destination\":\"10.0.1.2\",\"destination_port\":80,\
             \"chain\":\"watch\",\"connection\":\"0a0b0c0d\",\"stage\":\"syn\",\"address_id\":2,\
             \"backup\":true,\"token\":\"00000001\",\"nonce\":\"ffffffff\"}"
        );
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        let good = samples()[0].to_json();
        let names: Vec<String> = good.as_object().unwrap().keys().cloned().collect();
        for name in names {
            let mut bad = good.clone();
            bad[&name] = json!([]);
            let error = format!("{:#}", Event::from_json(&bad).unwrap_err());
            assert!(error.contains(&name), "{error}");
        }
        for value in [json!(1), json!({}), json!({ "event": "lost" })] {
            assert!(Message::from_json(&value).is_err(), "{value}");
        }
    }
}
