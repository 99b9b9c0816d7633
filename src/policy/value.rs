// SPDX-License-Identifier: MIT OR Apache-2.0
//! One JSON value to bytes and back, by [`FieldType`].

use std::net::{IpAddr, Ipv6Addr};

use serde_json::Value;

use super::btf::{Field, FieldType, max_of};
use super::pack::{Names, ReverseNames};
use super::services::ServicesFile;
use crate::error::{Invalid, did_you_mean};

/// Units of a duration with their nanoseconds, greatest first.
const UNITS: [(&str, u64); 6] = [
    ("h", 3_600_000_000_000),
    ("m", 60_000_000_000),
    ("s", 1_000_000_000),
    ("ms", 1_000_000),
    ("us", 1_000),
    ("ns", 1),
];

/// Bits of the IPv6 space in front of a mapped IPv4 address.
const MAPPED_BITS: u32 = 96;

const PORTS: (u64, u64) = (1, u16::MAX as u64);

impl Field {
    /// Inclusive bounds of the member's number; none if it has no number.
    pub fn bounds(&self) -> Option<(u64, u64)> {
        match &self.ty {
            FieldType::Unsigned { size, .. } => Some(self.range.unwrap_or((0, max_of(*size)))),
            FieldType::Duration => Some(self.range.unwrap_or((0, u64::MAX))),
            FieldType::Bool => Some(self.range.unwrap_or((0, 1))),
            FieldType::Device => Some((1, u32::MAX.into())),
            FieldType::Chain => Some((0, u32::MAX.into())),
            FieldType::Token => Some((1, u32::MAX.into())),
            FieldType::Port => Some(PORTS),
            FieldType::Enum { flags, names, .. } => {
                let values = || names.iter().map(|(_, value)| *value);
                let named = if *flags {
                    (0, values().fold(0, |all, value| all | value))
                } else {
                    (values().min().unwrap_or(0), values().max().unwrap_or(0))
                };
                Some(self.range.unwrap_or(named))
            }
            _ => None,
        }
    }

    /// Whether a value is the one that a tag names, by name or number.
    pub(super) fn is(&self, value: &Value, tagged: &str) -> bool {
        let number = match &self.ty {
            FieldType::Enum { names, .. } => names
                .iter()
                .find(|(name, _)| name == tagged)
                .map(|(_, number)| *number),
            _ => tagged.parse().ok(),
        };
        value.as_str() == Some(tagged) || (number.is_some() && value.as_u64() == number)
    }

    /// Whether an action may read the member from the element's argument.
    pub fn can_come_from_element(&self) -> bool {
        // What has one value only cannot come from anywhere.
        self.array.is_none()
            && self.range.is_none_or(|(low, high)| low < high)
            && matches!(
                self.ty,
                FieldType::Unsigned { .. }
                    | FieldType::Enum { .. }
                    | FieldType::Bool
                    | FieldType::Device
                    | FieldType::Chain
            )
    }

    /// The values accepted, in words: `a number from 0 to 65535`.
    pub fn words(&self) -> String {
        match &self.array {
            None => self.item_words(),
            Some(array) if self.ty == FieldType::Bytes => {
                format!("{}, at most {} bytes", self.item_words(), array.capacity)
            }
            Some(array) => format!(
                "{}, or a list of at most {}",
                self.item_words(),
                array.capacity
            ),
        }
    }

    fn item_words(&self) -> String {
        match &self.ty {
            FieldType::Unsigned { .. } => {
                let (low, high) = self.bounds().unwrap_or_default();
                format!("a number from {low} to {high}")
            }
            FieldType::Bool => match self.range {
                Some((low, high)) if low == high => format!("only {}", low != 0),
                _ => "true or false".to_owned(),
            },
            FieldType::Enum { flags, names, .. } => {
                let names: Vec<&str> = names.iter().map(|(name, _)| name.as_str()).collect();
                let count = if *flags { "one or a list" } else { "one" };
                let number = match self.range {
                    Some((low, high)) => format!(", or a number from {low} to {high}"),
                    None => String::new(),
                };
                format!("{count} of {}{number}", names.join(", "))
            }
            FieldType::Ip => "an IPv4 or IPv6 address".to_owned(),
            FieldType::Prefix => {
                "an address or a prefix such as \"10.0.0.0/8\" or \"2001:db8::/32\"".to_owned()
            }
            FieldType::Mac => "a MAC address such as \"02:00:00:00:00:01\"".to_owned(),
            FieldType::Device => "the name of a network device".to_owned(),
            FieldType::Chain => "the name of a chain".to_owned(),
            FieldType::Token => {
                "a token of 1 to 8 hex digits, as `ss -tniM` and `connections` show it".to_owned()
            }
            FieldType::Port => "a port from 1 to 65535 or a service name".to_owned(),
            FieldType::PortRange => {
                "a port from 1 to 65535, a service name, or a range \"LO-HI\"".to_owned()
            }
            FieldType::Duration => match self.range {
                Some((low, high)) => format!(
                    "a duration from {} to {}",
                    duration_text(low),
                    duration_text(high)
                ),
                None => "a duration such as \"200ms\" (units ns us ms s m h)".to_owned(),
            },
            FieldType::Bytes => "hexadecimal bytes such as \"1e0c0001\"".to_owned(),
        }
    }

    /// What a message says was expected: the values accepted and what they mean.
    pub(super) fn expectation(&self) -> String {
        format!("{} ({})", self.words(), self.doc)
    }
}

/// A value seen, short enough for a message.
pub(super) fn seen(value: &Value) -> String {
    const LONGEST: usize = 60;
    let (kind, text) = match value {
        Value::Null => return "null".to_owned(),
        Value::Bool(_) => ("", value.to_string()),
        Value::Number(_) => ("the number ", value.to_string()),
        Value::String(_) => ("the string ", value.to_string()),
        Value::Array(_) => ("the list ", value.to_string()),
        Value::Object(_) => ("the object ", value.to_string()),
    };
    if text.chars().count() <= LONGEST {
        return format!("{kind}{text}");
    }
    let start: String = text.chars().take(LONGEST).collect();
    format!("{kind}{start}...")
}

/// Writes an unsigned integer over all of `out`.
pub(super) fn put(out: &mut [u8], value: u64, big_endian: bool) {
    let size = out.len().min(8);
    if big_endian {
        out[..size].copy_from_slice(&value.to_be_bytes()[8 - size..]);
    } else if cfg!(target_endian = "little") {
        out[..size].copy_from_slice(&value.to_le_bytes()[..size]);
    } else {
        put(out, value, true);
    }
}

/// Reads the unsigned integer that fills `bytes`.
pub(super) fn get(bytes: &[u8], big_endian: bool) -> u64 {
    let add = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
    if big_endian || cfg!(target_endian = "big") {
        bytes.iter().fold(0, add)
    } else {
        bytes.iter().rev().fold(0, add)
    }
}

/// Writes one item of `field` over all of `out`, which has the item's size.
pub(super) fn encode(
    field: &Field,
    value: &Value,
    path: &str,
    names: &dyn Names,
    out: &mut [u8],
) -> Result<(), Invalid> {
    let encoder = Encoder {
        field,
        value,
        path,
        names,
    };
    match &field.ty {
        FieldType::Unsigned { big_endian, .. } => put(out, encoder.number()?, *big_endian),
        FieldType::Bool => put(out, encoder.boolean()?, false),
        FieldType::Enum { flags, names, .. } => {
            put(out, encoder.enumerators(*flags, names)?, false)
        }
        FieldType::Ip => out.copy_from_slice(&encoder.address()?.octets()),
        FieldType::Prefix => {
            let (length, address) = encoder.prefix()?;
            put(&mut out[..4], length.into(), false);
            out[4..].copy_from_slice(&address.octets());
        }
        FieldType::Mac => out.copy_from_slice(&encoder.mac()?),
        FieldType::Device => {
            let found = names.device(encoder.text()?);
            put(out, encoder.named(found)?.into(), false);
        }
        FieldType::Chain => {
            let found = names.chain(encoder.text()?);
            put(out, encoder.named(found)?.into(), false);
        }
        FieldType::Token => put(out, encoder.token()?.into(), false),
        FieldType::Port => put(out, encoder.port()?.into(), true),
        FieldType::PortRange => {
            let (first, last) = encoder.port_range()?;
            put(&mut out[..2], first.into(), false);
            put(&mut out[2..], last.into(), false);
        }
        FieldType::Duration => put(out, encoder.duration()?, false),
        FieldType::Bytes => return Err(encoder.wrong()),
    }
    Ok(())
}

/// The bytes of a hexadecimal string; spaces and colons may stand between them.
pub(super) fn hex(text: &str) -> Option<Vec<u8>> {
    let digits: Vec<u32> = text
        .chars()
        .filter(|c| !matches!(c, ' ' | ':'))
        .map(|c| c.to_digit(16))
        .collect::<Option<_>>()?;
    if digits.len() % 2 != 0 {
        return None;
    }
    digits
        .chunks(2)
        .map(|pair| u8::try_from(pair[0] << 4 | pair[1]).ok())
        .collect()
}

struct Encoder<'a> {
    field: &'a Field,
    value: &'a Value,
    path: &'a str,
    names: &'a dyn Names,
}

impl<'a> Encoder<'a> {
    fn wrong(&self) -> Invalid {
        self.wrong_because(seen(self.value))
    }

    fn wrong_because(&self, found: String) -> Invalid {
        Invalid::new(self.path, found, self.field.expectation())
    }

    fn text(&self) -> Result<&'a str, Invalid> {
        self.value.as_str().ok_or_else(|| self.wrong())
    }

    fn parsed<T>(&self, parsed: Option<T>) -> Result<T, Invalid> {
        parsed.ok_or_else(|| self.wrong())
    }

    fn named<T>(&self, found: Result<T, String>) -> Result<T, Invalid> {
        found.map_err(|why| self.wrong_because(format!("{}: {why}", seen(self.value))))
    }

    fn number(&self) -> Result<u64, Invalid> {
        let (low, high) = self.field.bounds().unwrap_or_default();
        let number = self.value.as_u64();
        self.parsed(number.filter(|number| (low..=high).contains(number)))
    }

    fn boolean(&self) -> Result<u64, Invalid> {
        let (low, high) = self.field.bounds().unwrap_or_default();
        let value = self.value.as_bool().map(u64::from);
        self.parsed(value.filter(|value| (low..=high).contains(value)))
    }

    fn enumerators(&self, flags: bool, names: &[(String, u64)]) -> Result<u64, Invalid> {
        match self.value {
            Value::Array(items) if flags && !items.is_empty() => {
                items.iter().try_fold(0, |all, item| {
                    let one = Encoder {
                        value: item,
                        ..*self
                    };
                    Ok(all | one.enumerator(names)?)
                })
            }
            _ => self.enumerator(names),
        }
    }

    fn enumerator(&self, names: &[(String, u64)]) -> Result<u64, Invalid> {
        if self.field.range.is_some() && self.value.is_number() {
            return self.number();
        }
        let text = self.text()?;
        let known = || names.iter().map(|(name, _)| name.as_str());
        names
            .iter()
            .find(|(name, _)| name == text)
            .map(|(_, value)| *value)
            .ok_or_else(|| {
                let suggestion = did_you_mean(text, known());
                self.wrong_because(format!("{}{suggestion}", seen(self.value)))
            })
    }

    fn address(&self) -> Result<Ipv6Addr, Invalid> {
        let address = self.parsed(self.text()?.parse::<IpAddr>().ok())?;
        let address = mapped(address);
        if address.is_unspecified() {
            return Err(self.wrong().advice(format!(
                "\"::\" stands for no address: leave \"{}\" out to mean any",
                self.field.name
            )));
        }
        Ok(address)
    }

    fn prefix(&self) -> Result<(u32, Ipv6Addr), Invalid> {
        let text = self.text()?;
        let (address, length) = match text.split_once('/') {
            Some((address, length)) => (address, Some(length)),
            None => (text, None),
        };
        let address = self.parsed(address.parse::<IpAddr>().ok())?;
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let length = match length {
            None => bits,
            Some(text) => self.parsed(decimal(text).filter(|length| *length <= bits))?,
        };
        let length = 128 - bits + length;
        let masked = mask(mapped(address), length);
        if masked != mapped(address) {
            return Err(self
                .wrong_because(format!("{}, with host bits set", seen(self.value)))
                .advice(format!("write \"{}\"", prefix_text(length, masked))));
        }
        Ok((length, masked))
    }

    fn mac(&self) -> Result<[u8; 6], Invalid> {
        let text = self.text()?;
        let mut bytes = [0; 6];
        let parts: Vec<&str> = text.split([':', '-']).collect();
        let whole = parts.len() == bytes.len();
        for (byte, part) in bytes.iter_mut().zip(parts) {
            let digits = part.len() == 2 && part.chars().all(|c| c.is_ascii_hexdigit());
            let parsed = u8::from_str_radix(part, 16).ok();
            *byte = self.parsed(parsed.filter(|_| digits && whole))?;
        }
        Ok(bytes)
    }

    fn port(&self) -> Result<u16, Invalid> {
        match self.value {
            Value::String(text) => self.port_of_text(text),
            other => {
                let port = other.as_u64().and_then(|port| u16::try_from(port).ok());
                self.parsed(port.filter(|port| *port != 0))
            }
        }
    }

    /// A port as text: a number, as the command line gives it, or the name of a service.
    fn port_of_text(&self, text: &str) -> Result<u16, Invalid> {
        if let Some(number) = decimal(text) {
            let port = u16::try_from(number).ok();
            return self.parsed(port.filter(|port| *port != 0));
        }
        self.names.service(text).ok_or_else(|| {
            let note = ServicesFile::system().note();
            self.wrong_because(format!("{}, no service known here", seen(self.value)))
                .advice(note.unwrap_or("use the number, or a TCP service of /etc/services"))
        })
    }

    /// Service names may hold hyphens, so only `NUMBER-NUMBER` is taken as a range.
    fn port_range(&self) -> Result<(u16, u16), Invalid> {
        let ends = self.value.as_str().and_then(|text| text.split_once('-'));
        let ends = ends.and_then(|(low, high)| Some((decimal(low.trim())?, decimal(high.trim())?)));
        let Some((low, high)) = ends else {
            let port = self.port()?;
            return Ok((port, port));
        };
        let range = u16::try_from(low).ok().zip(u16::try_from(high).ok());
        self.parsed(range.filter(|(low, high)| *low != 0 && low <= high))
    }

    fn token(&self) -> Result<u32, Invalid> {
        let text = self.text()?;
        let digits = text.strip_prefix("0x").unwrap_or(text);
        let plain = digits.bytes().all(|byte| byte.is_ascii_hexdigit());
        let token = u32::from_str_radix(digits, 16).ok();
        self.parsed(token.filter(|token| plain && *token != 0))
    }

    fn duration(&self) -> Result<u64, Invalid> {
        let (low, high) = self.field.bounds().unwrap_or_default();
        let parsed = parse_duration(self.text()?);
        self.parsed(parsed.filter(|time| (low..=high).contains(time)))
    }
}

/// Digits only: `str::parse` would take a leading plus sign.
fn decimal(text: &str) -> Option<u32> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    text.parse().ok().filter(|_| digits)
}

fn mapped(address: IpAddr) -> Ipv6Addr {
    match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    }
}

fn mask(address: Ipv6Addr, length: u32) -> Ipv6Addr {
    let kept = u128::MAX.checked_shl(128 - length.min(128)).unwrap_or(0);
    Ipv6Addr::from_bits(address.to_bits() & kept)
}

/// An address as users write it: IPv4 dotted.
fn address_text(address: Ipv6Addr) -> String {
    match address.to_ipv4_mapped() {
        Some(address) => address.to_string(),
        None => address.to_string(),
    }
}

fn prefix_text(length: u32, address: Ipv6Addr) -> String {
    match address.to_ipv4_mapped() {
        Some(address) if length >= MAPPED_BITS => format!("{address}/{}", length - MAPPED_BITS),
        _ => format!("{address}/{length}"),
    }
}

/// Nanoseconds of a duration such as `200ms`: a whole number and a unit.
pub fn parse_duration(text: &str) -> Option<u64> {
    let end = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(end);
    let (_, scale) = UNITS.into_iter().find(|(name, _)| *name == unit)?;
    number.parse::<u64>().ok()?.checked_mul(scale)
}

/// The duration in its greatest unit that leaves a whole number.
pub fn duration_text(nanoseconds: u64) -> String {
    let fitting = UNITS
        .into_iter()
        .find(|(_, scale)| nanoseconds != 0 && nanoseconds % scale == 0);
    let (unit, scale) = fitting.unwrap_or(("s", 1));
    format!("{}{unit}", nanoseconds / scale)
}

/// The JSON value of one item; a number where no name is known.
pub(super) fn decode(ty: &FieldType, bytes: &[u8], names: &dyn ReverseNames) -> Value {
    match ty {
        FieldType::Unsigned { big_endian, .. } => get(bytes, *big_endian).into(),
        FieldType::Bool => (get(bytes, false) != 0).into(),
        FieldType::Enum {
            flags: true, names, ..
        } => flag_names(get(bytes, false), names),
        FieldType::Enum { names, .. } => {
            let value = get(bytes, false);
            let name = names.iter().find(|(_, known)| *known == value);
            name.map_or(value.into(), |(name, _)| name.as_str().into())
        }
        FieldType::Ip => address_text(address_of(bytes)).into(),
        FieldType::Prefix => {
            let length = u32_of(&bytes[..4]);
            prefix_text(length, address_of(&bytes[4..])).into()
        }
        FieldType::Mac => hex_text(bytes, ":").into(),
        FieldType::Device => {
            let index = u32_of(bytes);
            names.device(index).map_or(index.into(), Value::from)
        }
        FieldType::Chain => {
            let id = u32_of(bytes);
            names.chain(id).map_or(id.into(), Value::from)
        }
        FieldType::Port => get(bytes, true).into(),
        FieldType::PortRange => {
            let (first, last) = (get(&bytes[..2], false), get(&bytes[2..], false));
            if first == last {
                first.into()
            } else {
                format!("{first}-{last}").into()
            }
        }
        FieldType::Duration => duration_text(get(bytes, false)).into(),
        FieldType::Token => format!("{:08x}", get(bytes, false)).into(),
        FieldType::Bytes => hex_text(bytes, "").into(),
    }
}

/// Bytes in hexadecimal.
pub(super) fn hex_text(bytes: &[u8], separator: &str) -> String {
    let bytes: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    bytes.join(separator)
}

fn u32_of(bytes: &[u8]) -> u32 {
    bytes.try_into().map_or(0, u32::from_ne_bytes)
}

fn address_of(bytes: &[u8]) -> Ipv6Addr {
    let octets: [u8; 16] = bytes.try_into().unwrap_or_default();
    Ipv6Addr::from(octets)
}

/// The enumerators whose bits are all set; bits without a name follow as a number.
fn flag_names(value: u64, names: &[(String, u64)]) -> Value {
    let set = names
        .iter()
        .filter(|(_, bits)| *bits != 0 && value & bits == *bits);
    let named = set.clone().fold(0, |all, (_, bits)| all | bits);
    let mut list: Vec<Value> = set.map(|(name, _)| name.as_str().into()).collect();
    if value & !named != 0 {
        list.push((value & !named).into());
    }
    list.into()
}
