// SPDX-License-Identifier: MIT OR Apache-2.0
//! Names of ports, from the services database of the system.

use std::collections::HashMap;
use std::path::Path;
use std::sync::OnceLock;

const SERVICES: &str = "/etc/services";

/// The services database, read once.
#[derive(Debug, Default)]
pub struct ServicesFile {
    ports: HashMap<String, u16>,
    note: Option<String>,
}

impl ServicesFile {
    /// `/etc/services`, read at the first call.
    pub fn system() -> &'static ServicesFile {
        static FILE: OnceLock<ServicesFile> = OnceLock::new();
        FILE.get_or_init(|| ServicesFile::read(Path::new(SERVICES)))
    }

    /// Reads a file in the format of services(5); one that cannot be read holds no names and
    /// leaves a [`note`](Self::note).
    pub fn read(path: &Path) -> ServicesFile {
        match std::fs::read(path) {
            Ok(bytes) => ServicesFile::parse(&String::from_utf8_lossy(&bytes)),
            Err(error) => ServicesFile {
                ports: HashMap::new(),
                note: Some(format!(
                    "{} cannot be read ({error}), so ports must be numbers",
                    path.display()
                )),
            },
        }
    }

    /// Parses text in the format of services(5). A name's TCP port wins over those of other
    /// protocols.
    pub fn parse(text: &str) -> ServicesFile {
        let mut ports = HashMap::new();
        let mut others = HashMap::new();
        for line in text.lines() {
            let Some(entry) = Entry::parse(line) else {
                continue;
            };
            let target = if entry.tcp { &mut ports } else { &mut others };
            for name in entry.names {
                target.entry(name.to_owned()).or_insert(entry.port);
            }
        }
        for (name, port) in others {
            ports.entry(name).or_insert(port);
        }
        ServicesFile { ports, note: None }
    }

    /// The port of a service, host byte order.
    pub fn port(&self, name: &str) -> Option<u16> {
        self.ports.get(name).copied()
    }

    /// Why no name is known, when the file could not be read.
    pub fn note(&self) -> Option<&str> {
        self.note.as_deref()
    }
}

struct Entry<'a> {
    names: Vec<&'a str>,
    port: u16,
    tcp: bool,
}

impl<'a> Entry<'a> {
    fn parse(line: &'a str) -> Option<Entry<'a>> {
        let line = line.split('#').next()?;
        let mut words = line.split_whitespace();
        let name = words.next()?;
        let (port, protocol) = words.next()?.split_once('/')?;
        Some(Entry {
            names: std::iter::once(name).chain(words).collect(),
            port: port.parse().ok().filter(|port| *port != 0)?,
            tcp: protocol == "tcp",
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use super::*;

    #[test]
    fn names_and_aliases_prefer_tcp() {
        let file = ServicesFile::parse(
            "# comment\nsyslog 514/udp\nshell\t514/tcp cmd # no passwords\n\
             both 1/udp\nboth 2/tcp\nbroken 70000/tcp\nzero 0/tcp\nshort\n",
        );
        assert_eq!(file.port("syslog"), Some(514));
        assert_eq!(file.port("cmd"), Some(514));
        assert_eq!(file.port("both"), Some(2));
        assert_eq!(file.port("broken"), None);
        assert_eq!(file.port("zero"), None);
        assert_eq!(file.note(), None);
    }

    #[test]
    fn a_missing_file_leaves_a_note() {
        let file = ServicesFile::read(Path::new("/nonexistent/services"));
        assert_eq!(file.port("http"), None);
        assert!(file.note().unwrap().contains("/nonexistent/services"));
    }
}
