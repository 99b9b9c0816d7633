// SPDX-License-Identifier: MIT OR Apache-2.0
//! What an event says, and how it is written: a line for people, or JSON.

use std::fmt;
use std::net::{IpAddr, SocketAddr};
use std::str::FromStr;

use super::time::Time;

/// Columns of an event's line, at most.
const COLUMNS: usize = 100;
/// What an address is not made shorter than.
const ADDRESS: usize = 16;

/// An enum of words: `name()`, and read from text.
macro_rules! words {
    ($(#[$about:meta])* $name:ident { $($(#[$of:meta])* $variant:ident $word:literal,)* }) => {
        $(#[$about])*
        #[derive(Clone, Copy, Debug, PartialEq, Eq)]
        pub enum $name { $($(#[$of])* $variant,)* }

        impl $name {
            /// As users see it.
            pub fn name(self) -> &'static str {
                match self { $($name::$variant => $word,)* }
            }
        }

        impl FromStr for $name {
            type Err = anyhow::Error;

            fn from_str(text: &str) -> anyhow::Result<$name> {
                match text {
                    $($word => Ok($name::$variant),)*
                    _ => anyhow::bail!("{text:?} is none of {:?}", [$($word),*]),
                }
            }
        }
    };
}

words! {
    /// Which way the segment passed the device.
    Direction {
        In "in",
        Out "out",
    }
}

words! {
    /// Which message of a handshake it is (RFC 9293, 3.5).
    Stage {
        Syn "syn",
        SynAck "syn_ack",
        /// The third, and repetitions of what it says (RFC 8684, 3.1).
        Ack "ack",
    }
}

words! {
    /// What showed that a connection goes on as plain TCP (RFC 8684, 3.7).
    Cause {
        /// The SYN had MP_CAPABLE, the SYN-ACK has none.
        SynAck "syn_ack",
        /// A DSS option with the data-level length 0.
        InfiniteMapping "infinite_mapping",
    }
}

words! {
    /// What ends a TCP connection (RFC 9293, 3.6).
    How {
        Fin "fin",
        Rst "rst",
    }
}

/// A data sequence number as the option had it (RFC 8684, 3.3). Text: 16 or 8 hex digits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataSequence {
    /// All 64 bits.
    Full(u64),
    /// The lower 32 bits.
    Low(u32),
}

impl fmt::Display for DataSequence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DataSequence::Full(number) => write!(f, "{number:016x}"),
            DataSequence::Low(number) => write!(f, "{number:08x}"),
        }
    }
}

impl FromStr for DataSequence {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<DataSequence> {
        Ok(match text.len() {
            8 => DataSequence::Low(u32::from_str_radix(text, 16)?),
            16 => DataSequence::Full(u64::from_str_radix(text, 16)?),
            length => anyhow::bail!("8 or 16 hex digits expected, found {length}"),
        })
    }
}

/// What a segment said. Numbers are in host order; keys and HMACs are never shown.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kind {
    /// RFC 8684, 3.1.
    MpCapable {
        stage: Stage,
        version: u8,
        /// A to H, A the greatest bit.
        flags: u8,
        /// Flag A.
        checksum_required: bool,
    },
    /// RFC 8684, 3.2.
    MpJoin {
        stage: Stage,
        /// Of the sender's address; SYN and SYN-ACK.
        address_id: Option<u8>,
        /// SYN and SYN-ACK.
        backup: Option<bool>,
        /// Of the receiver's host; SYN only.
        token: Option<u32>,
        /// SYN and SYN-ACK.
        nonce: Option<u32>,
    },
    /// RFC 8684, 3.4.1.
    AddAddr {
        address_id: u8,
        address: IpAddr,
        port: Option<u16>,
        echo: bool,
        /// Whether it is authenticated; an echo is not.
        hmac: bool,
        /// Bytes of the option.
        length: u8,
    },
    /// RFC 8684, 3.4.2.
    RemoveAddr {
        address_ids: Vec<u8>,
    },
    /// RFC 8684, 3.3.8.
    MpPrio {
        backup: bool,
        /// Other than that of the subflow (RFC 6824, 3.3.8).
        address_id: Option<u8>,
    },
    /// RFC 8684, 3.7.
    MpFail {
        /// Where the data begin whose checksum was wrong.
        data_sequence: DataSequence,
    },
    /// RFC 8684, 3.5.
    MpFastclose,
    /// RFC 8684, 3.6.
    MpTcprst {
        /// U, V, W, T; T, the least bit: what is wrong may pass.
        flags: u8,
        reason: u8,
    },
    /// RFC 8684, 3.3.3.
    DataFin {
        /// That of the DATA_FIN itself, the last of its mapping; none without a mapping.
        data_sequence: Option<DataSequence>,
    },
    Fallback {
        cause: Cause,
    },
    Close {
        how: How,
    },
}

impl Kind {
    /// As users see it.
    pub fn name(&self) -> &'static str {
        match self {
            Kind::MpCapable { .. } => "mp_capable",
            Kind::MpJoin { .. } => "mp_join",
            Kind::AddAddr { .. } => "add_addr",
            Kind::RemoveAddr { .. } => "remove_addr",
            Kind::MpPrio { .. } => "mp_prio",
            Kind::MpFail { .. } => "mp_fail",
            Kind::MpFastclose => "mp_fastclose",
            Kind::MpTcprst { .. } => "mp_tcprst",
            Kind::DataFin { .. } => "data_fin",
            Kind::Fallback { .. } => "fallback",
            Kind::Close { .. } => "close",
        }
    }
}

/// The name of a reason of MP_TCPRST (RFC 8684, 3.6).
pub fn tcprst_reason(reason: u8) -> &'static str {
    const NAMES: [&str; 7] = [
        "unspecified",
        "mptcp_specific",
        "lack_of_resources",
        "administratively_prohibited",
        "too_much_outstanding_data",
        "unacceptable_performance",
        "middlebox_interference",
    ];
    NAMES.get(usize::from(reason)).unwrap_or(&"unassigned")
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())?;
        match self {
            Kind::MpCapable {
                stage,
                version,
                checksum_required,
                ..
            } => {
                write!(f, " {} v{version}", stage.name())?;
                word(f, *checksum_required, "checksum")
            }
            Kind::MpJoin {
                stage,
                address_id,
                backup,
                token,
                ..
            } => {
                write!(f, " {}", stage.name())?;
                pair(f, "id", *address_id)?;
                word(f, *backup == Some(true), "backup")?;
                pair(f, "token", token.map(hex))
            }
            Kind::AddAddr {
                address_id,
                address,
                port,
                echo,
                hmac,
                ..
            } => {
                write!(f, " id {address_id} {address}")?;
                pair(f, "port", *port)?;
                word(f, *echo, "echo")?;
                word(f, !echo && !hmac, "no hmac")
            }
            Kind::RemoveAddr { address_ids } => {
                let ids: Vec<String> = address_ids.iter().map(u8::to_string).collect();
                write!(f, " id {}", ids.join(","))
            }
            Kind::MpPrio { backup, address_id } => {
                f.write_str(if *backup { " backup" } else { " regular" })?;
                pair(f, "id", *address_id)
            }
            Kind::MpFail { data_sequence } => write!(f, " {data_sequence}"),
            Kind::MpFastclose => Ok(()),
            Kind::MpTcprst { flags, reason } => {
                write!(f, " {}", tcprst_reason(*reason))?;
                word(f, flags & 1 != 0, "transient")
            }
            Kind::DataFin { data_sequence } => match data_sequence {
                Some(number) => write!(f, " {number}"),
                None => Ok(()),
            },
            Kind::Fallback { cause } => write!(f, " {}", cause.name()),
            Kind::Close { how } => write!(f, " {}", how.name()),
        }
    }
}

fn word(f: &mut fmt::Formatter<'_>, there: bool, word: &str) -> fmt::Result {
    match there {
        true => write!(f, " {word}"),
        false => Ok(()),
    }
}

fn pair(f: &mut fmt::Formatter<'_>, name: &str, value: Option<impl fmt::Display>) -> fmt::Result {
    value.map_or(Ok(()), |value| write!(f, " {name} {value}"))
}

/// A token or nonce as 8 hex digits.
pub fn hex(number: u32) -> String {
    format!("{number:08x}")
}

/// One thing that one segment said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Event {
    pub time: Time,
    /// Its name, or its index if it is gone.
    pub device: String,
    pub direction: Direction,
    pub source: SocketAddr,
    pub destination: SocketAddr,
    /// Name of the chain that reported it, unless that is gone.
    pub chain: Option<String>,
    /// The source's host's token of the connection (RFC 8684, 3.1), if it is known.
    pub connection: Option<u32>,
    pub kind: Kind,
}

/// One line of at most 100 columns; where that is too few, addresses are cut.
impl fmt::Display for Event {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let head = format!(
            "{} {:<3} {} {} {}",
            self.time.clock_time(),
            self.direction.name(),
            self.device,
            self.connection.map_or_else(|| "-".to_owned(), hex),
            self.kind
        );
        let room = COLUMNS.saturating_sub(head.chars().count() + 5);
        let ends = [self.source, self.destination].map(|end| end.to_string());
        let [source, destination] = match ends.iter().map(String::len).sum::<usize>() <= room {
            true => ends,
            false => ends.map(|end| cut(&end, (room / 2).max(ADDRESS))),
        };
        let line = format!("{head}  {source} > {destination}");
        match line.char_indices().nth(COLUMNS) {
            None => f.write_str(&line),
            Some(_) => {
                let kept: String = line.chars().take(COLUMNS - 1).collect();
                write!(f, "{kept}…")
            }
        }
    }
}

/// Makes a text no longer than `room`, which must be 2 or more: its middle goes.
fn cut(text: &str, room: usize) -> String {
    if text.len() <= room {
        return text.to_owned();
    }
    let end = room / 2;
    let start = room - end - 1;
    format!("{}…{}", &text[..start], &text[text.len() - end..])
}

/// What a subscriber is told.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    Event(Event),
    /// So many events are missing here: the subscriber took them too slowly.
    Lost(u64),
}

impl fmt::Display for Message {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Message::Event(event) => event.fmt(f),
            Message::Lost(count) => write!(f, "lost {count}"),
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
pub(super) mod tests {
    use super::*;

    fn event(kind: Kind, source: &str, destination: &str) -> Event {
        Event {
            time: Time(1_735_689_600_001_002_003),
            device: "path1".to_owned(),
            direction: Direction::Out,
            source: source.parse().unwrap(),
            destination: destination.parse().unwrap(),
            chain: Some("watch".to_owned()),
            connection: Some(0x0a0b_0c0d),
            kind,
        }
    }

    /// One of every kind, and of every form of it.
    pub fn samples() -> Vec<Event> {
        let kinds = [
            Kind::MpCapable {
                stage: Stage::SynAck,
                version: 1,
                flags: 0x81,
                checksum_required: true,
            },
            Kind::MpJoin {
                stage: Stage::Syn,
                address_id: Some(2),
                backup: Some(true),
                token: Some(1),
                nonce: Some(0xffff_ffff),
            },
            Kind::MpJoin {
                stage: Stage::Ack,
                address_id: None,
                backup: None,
                token: None,
                nonce: None,
            },
            Kind::AddAddr {
                address_id: 255,
                address: "2001:db8:1111:2222:3333:4444:5555:6666".parse().unwrap(),
                port: Some(65535),
                echo: false,
                hmac: false,
                length: 22,
            },
            Kind::AddAddr {
                address_id: 1,
                address: "10.0.2.1".parse().unwrap(),
                port: None,
                echo: true,
                hmac: false,
                length: 8,
            },
            Kind::RemoveAddr {
                address_ids: (200..=236).collect(),
            },
            Kind::MpPrio {
                backup: false,
                address_id: Some(3),
            },
            Kind::MpPrio {
                backup: true,
                address_id: None,
            },
            Kind::MpFail {
                data_sequence: DataSequence::Full(u64::MAX - 1),
            },
            Kind::MpFastclose,
            Kind::MpTcprst {
                flags: 1,
                reason: 6,
            },
            Kind::MpTcprst {
                flags: 0,
                reason: 200,
            },
            Kind::DataFin {
                data_sequence: Some(DataSequence::Low(7)),
            },
            Kind::DataFin {
                data_sequence: None,
            },
            Kind::Fallback {
                cause: Cause::InfiniteMapping,
            },
            Kind::Close { how: How::Rst },
        ];
        let long = "[2001:db8:1111:2222:3333:4444:5555:6666]:40000";
        let mut samples = Vec::new();
        for kind in kinds {
            samples.push(event(kind.clone(), "10.0.1.1:40000", "10.0.1.2:80"));
            samples.push(event(kind, long, long));
        }
        samples[3].chain = None;
        samples[3].connection = None;
        samples[5].direction = Direction::In;
        samples
    }

    #[test]
    fn lines_fit() {
        for event in samples() {
            let line = event.to_string();
            assert!(line.chars().count() <= COLUMNS, "{line}");
            assert!(line.contains(event.kind.name()), "{line}");
        }
    }

    #[test]
    fn a_line() {
        let samples = samples();
        assert_eq!(
            samples[2].to_string(),
            "00:00:00.001 out path1 0a0b0c0d mp_join syn id 2 backup token 00000001  \
             10.0.1.1:40000 > 10.0.1.2:80"
        );
        assert_eq!(
            samples[29].to_string(),
            "00:00:00.001 out path1 0a0b0c0d fallback infinite_mapping  \
             [2001:db8…66]:40000 > [2001:db8…66]:40000"
        );
        assert_eq!(Message::Lost(7).to_string(), "lost 7");
    }
}
