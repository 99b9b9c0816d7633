// SPDX-License-Identifier: MIT OR Apache-2.0
//! Hosts, devices and addresses of a testbed, and how they are told.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::str::FromStr;

use serde_json::{Map, Value, json};

use super::{IPV4_LENGTH, IPV6_LENGTH, PREFIX};
use crate::error::{Invalid, did_you_mean};

/// A host of a testbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Client,
    Server,
    Router,
    /// Carries frames from one to the other, late; no host that packets can tell of.
    Relay,
}

impl Role {
    pub const ALL: [Role; 4] = [Role::Client, Role::Server, Role::Router, Role::Relay];

    pub fn name(self) -> &'static str {
        match self {
            Role::Client => "client",
            Role::Server => "server",
            Role::Router => "router",
            Role::Relay => "relay",
        }
    }

    /// Name of this host's namespace in the testbed `testbed`.
    pub(super) fn namespace(self, testbed: &str) -> String {
        format!("{PREFIX}{testbed}-{self}")
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Role {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let near = || did_you_mean(text, Role::ALL.map(Role::name));
        Role::ALL
            .into_iter()
            .find(|role| role.name() == text)
            .ok_or_else(|| {
                let found = format!("\"{text}\"{}", near());
                Invalid::new("role", found, "client, server, router or relay")
            })
    }
}

/// One end of a veth pair.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Interface {
    /// Device name, unique in its namespace only.
    pub device: String,
    /// Unique in the testbed.
    pub ifindex: u32,
    /// Network order, as on the wire.
    pub mac: [u8; 6],
    /// Its subnet's length is [`IPV4_LENGTH`].
    pub ipv4: Ipv4Addr,
    /// Its subnet's length is [`IPV6_LENGTH`].
    pub ipv6: Ipv6Addr,
}

/// The router's two ends of one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RouterInterfaces {
    /// The one towards the client.
    pub client: Interface,
    /// The one towards the server.
    pub server: Interface,
}

/// A device of the relay: it has no address but that of the link.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Port {
    /// Device name, unique in its namespace only.
    pub device: String,
    /// Unique in the testbed.
    pub ifindex: u32,
    /// Network order, as on the wire.
    pub mac: [u8; 6],
}

/// The relay's two ends of one path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct RelayPorts {
    /// The one towards the client.
    pub client: Port,
    /// The one towards the server.
    pub server: Port,
}

/// One path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathDescription {
    /// Counted from 1.
    pub number: u8,
    pub client: Interface,
    pub server: Interface,
    pub router: Option<RouterInterfaces>,
    pub relay: Option<RelayPorts>,
}

/// A device of a host, and what its packets reach first.
pub(super) struct Link<'a> {
    pub own: &'a Interface,
    pub peer: &'a Interface,
}

/// A veth pair: each end with its host.
pub(super) struct Pair(pub (Role, Port), pub (Role, Port));

/// A testbed's hosts, devices and addresses. `Display` is a table of at most 100 columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub name: String,
    /// The hosts there are, with the names of their namespaces.
    pub namespaces: Vec<(Role, String)>,
    pub paths: Vec<PathDescription>,
}

/// What the last byte but one of a MAC address and the hundreds of an interface index say.
///
/// The two ends of a veth pair must not have the same index by chance, as they would in fresh
/// namespaces: the kernel then takes neither for a link to another device, and notices that it
/// can send up to a second late.
#[derive(Clone, Copy)]
enum Station {
    Client = 1,
    Server = 2,
    RouterToClient = 3,
    RouterToServer = 4,
    RelayToClient = 5,
    RelayToServer = 6,
}

fn port(station: Station, path: u8) -> Port {
    let device = match station {
        Station::Client | Station::Server => "path",
        Station::RouterToClient | Station::RelayToClient => "client",
        Station::RouterToServer | Station::RelayToServer => "server",
    };
    Port {
        device: format!("{device}{path}"),
        ifindex: 100 * station as u32 + u32::from(path),
        mac: [0x02, b'p', b'c', 0, station as u8, path],
    }
}

/// The path's end at `station`: `net` is 0 for the direct subnet, 1 for the client's and 2 for
/// the server's side of a router; `host` the address in the subnet.
fn interface(station: Station, path: u8, net: u8, host: u8) -> Interface {
    let port = port(station, path);
    Interface {
        device: port.device,
        ifindex: port.ifindex,
        mac: port.mac,
        ipv4: Ipv4Addr::new(10, net, path, host),
        ipv6: Ipv6Addr::new(0xfd00, net.into(), 0, path.into(), 0, 0, 0, host.into()),
    }
}

fn describe_path(number: u8, router: bool, relay: bool) -> PathDescription {
    let relay = relay.then(|| RelayPorts {
        client: port(Station::RelayToClient, number),
        server: port(Station::RelayToServer, number),
    });
    if !router {
        return PathDescription {
            number,
            client: interface(Station::Client, number, 0, 1),
            server: interface(Station::Server, number, 0, 2),
            router: None,
            relay,
        };
    }
    PathDescription {
        number,
        client: interface(Station::Client, number, 1, 1),
        server: interface(Station::Server, number, 2, 1),
        router: Some(RouterInterfaces {
            client: interface(Station::RouterToClient, number, 1, 254),
            server: interface(Station::RouterToServer, number, 2, 254),
        }),
        relay,
    }
}

/// Of a testbed with these paths, and these hosts beside client and server.
pub(super) fn describe(name: &str, paths: u8, router: bool, relay: bool) -> Description {
    let exists = |role: &Role| match role {
        Role::Client | Role::Server => true,
        Role::Router => router,
        Role::Relay => relay,
    };
    Description {
        name: name.to_owned(),
        namespaces: Role::ALL
            .into_iter()
            .filter(exists)
            .map(|role| (role, role.namespace(name)))
            .collect(),
        paths: (1..=paths)
            .map(|number| describe_path(number, router, relay))
            .collect(),
    }
}

impl Port {
    /// The MAC address as text, `02:70:63:00:05:01`.
    pub fn mac_text(&self) -> String {
        mac_text(self.mac)
    }

    fn to_json(&self) -> Value {
        json!({ "device": self.device, "ifindex": self.ifindex, "mac": self.mac_text() })
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

impl Interface {
    /// The MAC address as text, `02:70:63:00:01:01`.
    pub fn mac_text(&self) -> String {
        mac_text(self.mac)
    }

    fn port(&self) -> Port {
        Port {
            device: self.device.clone(),
            ifindex: self.ifindex,
            mac: self.mac,
        }
    }

    pub(super) fn subnets(&self) -> [String; 2] {
        let ipv4 = Ipv4Addr::from_bits(self.ipv4.to_bits() & (u32::MAX << (32 - IPV4_LENGTH)));
        let ipv6 = Ipv6Addr::from_bits(self.ipv6.to_bits() & (u128::MAX << (128 - IPV6_LENGTH)));
        [
            format!("{ipv4}/{IPV4_LENGTH}"),
            format!("{ipv6}/{IPV6_LENGTH}"),
        ]
    }

    fn to_json(&self) -> Value {
        json!({
            "device": self.device,
            "ifindex": self.ifindex,
            "mac": self.mac_text(),
            "ipv4": self.ipv4,
            "ipv4_length": IPV4_LENGTH,
            "ipv6": self.ipv6,
            "ipv6_length": IPV6_LENGTH,
        })
    }
}

impl PathDescription {
    /// What the client's packets reach first.
    pub(super) fn next_of_client(&self) -> &Interface {
        self.router.as_ref().map_or(&self.server, |it| &it.client)
    }

    /// What the server's packets reach first.
    pub(super) fn next_of_server(&self) -> &Interface {
        self.router.as_ref().map_or(&self.client, |it| &it.server)
    }

    /// The devices of a host that have addresses.
    pub(super) fn links(&self, role: Role) -> Vec<Link<'_>> {
        match (role, &self.router) {
            (Role::Client, _) => vec![Link {
                own: &self.client,
                peer: self.next_of_client(),
            }],
            (Role::Server, _) => vec![Link {
                own: &self.server,
                peer: self.next_of_server(),
            }],
            (Role::Router, Some(router)) => [
                (&router.client, &self.client),
                (&router.server, &self.server),
            ]
            .map(|(own, peer)| Link { own, peer })
            .into(),
            (Role::Router | Role::Relay, _) => Vec::new(),
        }
    }

    /// The veth pairs, with the host first that has an end of each.
    pub(super) fn pairs(&self) -> Vec<Pair> {
        let client = (Role::Client, self.client.port());
        let server = (Role::Server, self.server.port());
        if let Some(router) = &self.router {
            let [to_client, to_server] = [&router.client, &router.server].map(Interface::port);
            return vec![
                Pair((Role::Router, to_client), client),
                Pair((Role::Router, to_server), server),
            ];
        }
        if let Some(relay) = &self.relay {
            return vec![
                Pair((Role::Relay, relay.client.clone()), client),
                Pair((Role::Relay, relay.server.clone()), server),
            ];
        }
        vec![Pair(server, client)]
    }

    /// Names of the devices of a host.
    pub(super) fn devices(&self, role: Role) -> Vec<&str> {
        match (role, &self.relay) {
            (Role::Relay, Some(relay)) => vec![&relay.client.device, &relay.server.device],
            _ => self
                .links(role)
                .into_iter()
                .map(|link| link.own.device.as_str())
                .collect(),
        }
    }

    fn to_json(&self) -> Value {
        let mut path = Map::new();
        path.insert("path".into(), self.number.into());
        path.insert("client".into(), self.client.to_json());
        if let Some(router) = &self.router {
            let ends = json!({
                "client": router.client.to_json(),
                "server": router.server.to_json(),
            });
            path.insert("router".into(), ends);
        }
        if let Some(relay) = &self.relay {
            let ends = json!({
                "client": relay.client.to_json(),
                "server": relay.server.to_json(),
            });
            path.insert("relay".into(), ends);
        }
        path.insert("server".into(), self.server.to_json());
        path.into()
    }
}

impl Description {
    /// `{"testbed", "namespaces": {ROLE: NAME}, "paths": [{"path", "client", "server"}]}`; with a
    /// router each path also has `"router": {"client", "server"}`, with a relay `"relay"` alike.
    /// Ends are objects of `device`, `ifindex`, `mac` and, but for the relay, `ipv4`,
    /// `ipv4_length`, `ipv6`, `ipv6_length`.
    pub fn to_json(&self) -> Value {
        let namespaces: Map<String, Value> = self
            .namespaces
            .iter()
            .map(|(role, namespace)| (role.to_string(), namespace.as_str().into()))
            .collect();
        let paths: Vec<Value> = self.paths.iter().map(PathDescription::to_json).collect();
        json!({ "testbed": self.name, "namespaces": namespaces, "paths": paths })
    }

    pub(super) fn links(&self, role: Role) -> impl Iterator<Item = Link<'_>> {
        self.paths.iter().flat_map(move |path| path.links(role))
    }

    pub(super) fn devices(&self, role: Role) -> impl Iterator<Item = &str> {
        self.paths.iter().flat_map(move |path| path.devices(role))
    }
}

impl fmt::Display for Description {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "ROLE    NAMESPACE")?;
        for (role, namespace) in &self.namespaces {
            writeln!(f, "{role:<8}{namespace}")?;
        }
        writeln!(f)?;
        write_row(
            f,
            ["PATH", "ROLE", "DEVICE", "INDEX", "IPV4", "IPV6", "MAC"],
        )?;
        for path in &self.paths {
            for role in [Role::Client, Role::Router, Role::Relay, Role::Server] {
                for Link { own, .. } in path.links(role) {
                    writeln!(f)?;
                    let addresses = [
                        format!("{}/{IPV4_LENGTH}", own.ipv4),
                        format!("{}/{IPV6_LENGTH}", own.ipv6),
                    ];
                    write_end(f, path.number, role, &own.port(), addresses)?;
                }
                let relay = path.relay.iter().filter(|_| role == Role::Relay);
                for port in relay.flat_map(|it| [&it.client, &it.server]) {
                    writeln!(f)?;
                    write_end(f, path.number, role, port, ["-".into(), "-".into()])?;
                }
            }
        }
        Ok(())
    }
}

fn write_end(
    f: &mut fmt::Formatter<'_>,
    path: u8,
    role: Role,
    end: &Port,
    [ipv4, ipv6]: [String; 2],
) -> fmt::Result {
    let (path, ifindex, mac) = (path.to_string(), end.ifindex.to_string(), end.mac_text());
    write_row(
        f,
        [
            &path,
            role.name(),
            &end.device,
            &ifindex,
            &ipv4,
            &ipv6,
            &mac,
        ],
    )
}

fn write_row(f: &mut fmt::Formatter<'_>, cells: [&str; 7]) -> fmt::Result {
    let [path, role, device, ifindex, ipv4, ipv6, mac] = cells;
    write!(
        f,
        "{path:<6}{role:<8}{device:<9}{ifindex:<7}{ipv4:<15}{ipv6:<21}{mac}"
    )
}
