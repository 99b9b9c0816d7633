// SPDX-License-Identifier: MIT OR Apache-2.0
//! Testbeds: a client and a server in namespaces of their own, joined by one or more paths.
//!
//! Everything is fixed by the name, the number of paths and whether there is a router: devices,
//! MAC and IP addresses, permanent neighbours, routes. There is no address detection, router
//! solicitation or neighbour discovery, so a capture holds what the test sent and nothing else.
//!
//! | | client | router | server |
//! |---|---|---|---|
//! | without router | `path1` 10.0.1.1 fd00:0:0:1::1 | | `path1` 10.0.1.2 fd00:0:0:1::2 |
//! | with router | `path1` 10.1.1.1 fd00:1:0:1::1 | `client1` 10.1.1.254 fd00:1:0:1::fe, `server1` 10.2.1.254 fd00:2:0:1::fe | `path1` 10.2.1.1 fd00:2:0:1::1 |
//!
//! Path 2 has a 2 in place of the last 1 of the names and of the third part of IPv4 and fourth
//! part of IPv6 addresses, and so on. Every device also has a route, less preferred, to the other
//! paths' subnets, so that a socket bound to one path's device reaches every address of the peer
//! (MPTCP's subflows are such sockets).

use std::convert::Infallible;
use std::ffi::OsStr;
use std::fmt;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::ops::Deref;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{self, Command, ExitStatus};
use std::str::FromStr;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::net::if_::if_nametoindex;
use nix::unistd::geteuid;
use serde_json::{Map, Value, json};

use crate::error::{Invalid, Refused, did_you_mean};
use crate::netns::{self, Namespace};

/// Most paths a testbed can have.
pub const MAX_PATHS: u8 = 8;
/// Prefix length of every IPv4 subnet.
pub const IPV4_LENGTH: u8 = 24;
/// Prefix length of every IPv6 subnet.
pub const IPV6_LENGTH: u8 = 64;

const PREFIX: &str = "pc-";
const MAX_NAME: usize = 32;

/// Metric of the route to the peer's subnet of the same path.
const METRIC_SAME_PATH: u32 = 100;
/// Metric of the routes to the peer's other subnets, plus the path; above the 1024 that IPv6
/// routes get by default.
const METRIC_OTHER_PATH: u32 = 2000;

/// Longest wait for the multicast reports of fresh devices.
const SETTLE_LIMIT: Duration = Duration::from_millis(500);

/// A host of a testbed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Role {
    Client,
    Server,
    Router,
}

impl Role {
    pub const ALL: [Role; 3] = [Role::Client, Role::Server, Role::Router];

    pub fn name(self) -> &'static str {
        match self {
            Role::Client => "client",
            Role::Server => "server",
            Role::Router => "router",
        }
    }

    /// Name of this host's namespace in the testbed `testbed`.
    fn namespace(self, testbed: &str) -> String {
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
                Invalid::new("role", found, "client, server or router")
            })
    }
}

/// What a testbed is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Options {
    /// Paths between client and server, 1 to [`MAX_PATHS`].
    pub paths: u8,
    /// Whether every path goes through a forwarding host.
    pub router: bool,
}

impl Default for Options {
    /// One path, no router.
    fn default() -> Self {
        Options {
            paths: 1,
            router: false,
        }
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

/// One path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PathDescription {
    /// Counted from 1.
    pub number: u8,
    pub client: Interface,
    pub server: Interface,
    pub router: Option<RouterInterfaces>,
}

/// A veth pair, seen from one of its ends.
struct Link<'a> {
    own: &'a Interface,
    peer_role: Role,
    peer: &'a Interface,
}

/// A testbed's hosts, devices and addresses. `Display` is a table of at most 100 columns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Description {
    pub name: String,
    /// The hosts there are, with the names of their namespaces.
    pub namespaces: Vec<(Role, String)>,
    pub paths: Vec<PathDescription>,
}

/// A complete testbed. Dropping it leaves it up; see [`down`] and [`ScopedTestbed`].
#[derive(Clone, Debug)]
pub struct Testbed {
    description: Description,
    namespaces: Vec<(Role, Namespace)>,
}

impl Testbed {
    /// Makes the testbed `name`; if that fails, nothing stays. Afterwards the devices are ready
    /// to send and have sent what they send unasked (reports of multicast membership).
    ///
    /// # Errors
    /// [`Invalid`] for a bad name or number of paths. [`Refused`] (state) if one of its
    /// namespaces exists or iproute2 is missing, (denied) without root or kernel support.
    pub fn up(name: &str, options: &Options) -> Result<Testbed> {
        check_name(name)?;
        check_paths(options.paths)?;
        if !existing(name).is_empty() {
            return Err(Refused::state(
                format!("cannot make testbed {name}"),
                "it exists, maybe in parts",
                format!("remove it with: policy-chain testbed down {name}"),
            )
            .into());
        }
        let description = describe(name, options);
        let mut making = Making::default();
        for (role, namespace) in &description.namespaces {
            making.0.push((*role, Namespace::create(namespace)?));
        }
        for (role, namespace) in &making.0 {
            let forward = *role == Role::Router;
            namespace.enter(|| write_settings(forward))??;
        }
        configure(&description, &making.0)?;
        settle(&description, &making.0)?;
        Ok(Testbed {
            description,
            namespaces: making.keep(),
        })
    }

    /// Opens the testbed `name`.
    ///
    /// # Errors
    /// [`Invalid`] for a bad name. [`Refused`] (state) if there is no such testbed or it is
    /// incomplete, (denied) without permission.
    pub fn open(name: &str) -> Result<Testbed> {
        check_name(name)?;
        let roles = existing(name);
        if roles.is_empty() {
            return Err(no_testbed(name).into());
        }
        let mut namespaces = Vec::new();
        for role in roles {
            namespaces.push((role, Namespace::open(&role.namespace(name))?));
        }
        let incomplete = || {
            Refused::state(
                format!("cannot use testbed {name}"),
                "a namespace or a device of it is missing",
                format!("remove it with: policy-chain testbed down {name}"),
            )
        };
        let router = namespaces.iter().any(|(role, _)| *role == Role::Router);
        let paths = count_paths(&namespaces)?;
        let description = describe(name, &Options { paths, router });
        let complete = paths > 0 && namespaces.len() == description.namespaces.len();
        if !complete || !has_devices(&description, &namespaces)? {
            return Err(incomplete().into());
        }
        Ok(Testbed {
            description,
            namespaces,
        })
    }

    pub fn name(&self) -> &str {
        &self.description.name
    }

    pub fn describe(&self) -> &Description {
        &self.description
    }

    /// The path `number`, counted from 1.
    pub fn path(&self, number: u8) -> Option<&PathDescription> {
        let position = usize::from(number).checked_sub(1)?;
        self.description.paths.get(position)
    }

    /// The namespace of a host.
    ///
    /// # Errors
    /// [`Refused`] (state) for the router of a testbed without one.
    pub fn namespace(&self, role: Role) -> Result<&Namespace> {
        self.namespaces
            .iter()
            .find(|(other, _)| *other == role)
            .map(|(_, namespace)| namespace)
            .ok_or_else(|| {
                let name = self.name();
                Refused::state(
                    format!("testbed {name} has no {role}"),
                    "it was made without one",
                    format!(
                        "make it anew: policy-chain testbed down {name}, then \
                         policy-chain testbed up {name} --{role}"
                    ),
                )
                .into()
            })
    }

    /// Runs a program on a host, with the caller's standard streams, and waits for it.
    ///
    /// # Errors
    /// [`Invalid`] for an empty command line. [`Refused`] (state) if there is no such host or
    /// program, (denied) without permission to enter.
    pub fn exec<S: AsRef<OsStr>>(&self, role: Role, argv: &[S]) -> Result<ExitStatus> {
        let (mut command, what) = self.command(role, argv)?;
        let status = command.status();
        status.map_err(|error| exec_refusal(what, &error).into())
    }

    /// As [`Testbed::exec`], but the program takes the place of the calling process, and gets the
    /// signals meant for it. Returns only if that failed.
    ///
    /// # Errors
    /// As [`Testbed::exec`].
    pub fn become_program<S: AsRef<OsStr>>(&self, role: Role, argv: &[S]) -> Result<Infallible> {
        let (mut command, what) = self.command(role, argv)?;
        Err(exec_refusal(what, &command.exec()).into())
    }

    /// The command, and what could not be done if it fails.
    fn command<S: AsRef<OsStr>>(&self, role: Role, argv: &[S]) -> Result<(Command, String)> {
        let Some((program, arguments)) = argv.split_first() else {
            return Err(Invalid::new("CMD", "nothing", "a program and its arguments").into());
        };
        let namespace = self.namespace(role)?;
        let mut command = namespace.command(program);
        command.args(arguments);
        let program = Path::new(program).display();
        let what = format!("cannot run {program} in {}", namespace.name());
        Ok((command, what))
    }
}

fn exec_refusal(what: String, error: &io::Error) -> Refused {
    let denied = error.kind() == io::ErrorKind::PermissionDenied;
    if denied && !geteuid().is_root() {
        return Refused::denied(what, error, "run as root");
    }
    Refused::state(
        what,
        error,
        "check the program's name and that it is executable",
    )
}

/// Removes every namespace of the testbed `name`, also of one half made. A process still running
/// in one keeps that namespace, now nameless, until it ends.
///
/// # Errors
/// [`Invalid`] for a bad name. [`Refused`] (state) if there is nothing to remove, (denied)
/// without root.
pub fn down(name: &str) -> Result<()> {
    check_name(name)?;
    let roles = existing(name);
    if roles.is_empty() {
        return Err(no_testbed(name).into());
    }
    let removals: Vec<Result<()>> = roles
        .into_iter()
        .map(|role| Namespace::remove(&role.namespace(name)))
        .collect();
    removals.into_iter().collect()
}

/// Names of the testbeds there are, also of incomplete ones, in order.
pub fn list() -> Result<Vec<String>> {
    let entries = match fs::read_dir(netns::FOLDER) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot list {}", netns::FOLDER));
        }
    };
    let mut names: Vec<String> = entries
        .filter_map(|entry| testbed_of(entry.ok()?.file_name().to_str()?).map(str::to_owned))
        .collect();
    names.sort();
    names.dedup();
    Ok(names)
}

/// The testbed that a namespace called `namespace` belongs to.
fn testbed_of(namespace: &str) -> Option<&str> {
    let (name, role) = namespace.strip_prefix(PREFIX)?.rsplit_once('-')?;
    role.parse::<Role>().ok()?;
    check_name(name).ok()?;
    Some(name)
}

/// The hosts of the testbed `name` that have a namespace.
fn existing(name: &str) -> Vec<Role> {
    Role::ALL
        .into_iter()
        .filter(|role| Namespace::exists(&role.namespace(name)))
        .collect()
}

fn no_testbed(name: &str) -> Refused {
    let names = list().unwrap_or_default();
    let near = did_you_mean(name, names.iter().map(String::as_str));
    Refused::state(
        format!("there is no testbed {name}"),
        format!("it has no namespace in {}{near}", netns::FOLDER),
        format!("make it with: policy-chain testbed up {name}"),
    )
}

fn check_name(name: &str) -> Result<(), Invalid> {
    let usable = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    if (1..=MAX_NAME).contains(&name.len()) && name.bytes().all(usable) {
        return Ok(());
    }
    Err(Invalid::new(
        "NAME",
        format!("\"{name}\""),
        format!("a testbed's name: 1 to {MAX_NAME} of a-z 0-9 _ -"),
    ))
}

fn check_paths(paths: u8) -> Result<(), Invalid> {
    if (1..=MAX_PATHS).contains(&paths) {
        return Ok(());
    }
    Err(Invalid::new("--paths", paths, format!("1 to {MAX_PATHS}")))
}

/// Namespaces of a testbed not yet complete; dropping it removes them, and only them: another
/// process may be making the same testbed.
#[derive(Default)]
struct Making(Vec<(Role, Namespace)>);

impl Making {
    fn keep(mut self) -> Vec<(Role, Namespace)> {
        std::mem::take(&mut self.0)
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        for (_, namespace) in self.0.drain(..) {
            // The failure that led here is the one to report.
            let _ = namespace.delete();
        }
    }
}

// ---- addresses -------------------------------------------------------------------------------

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
}

/// The path's end at `station`: `net` is 0 for the direct subnet, 1 for the client's and 2 for
/// the server's side of a router; `host` the address in the subnet.
fn interface(station: Station, path: u8, net: u8, host: u8) -> Interface {
    let device = match station {
        Station::Client | Station::Server => "path",
        Station::RouterToClient => "client",
        Station::RouterToServer => "server",
    };
    Interface {
        device: format!("{device}{path}"),
        ifindex: 100 * station as u32 + u32::from(path),
        mac: [0x02, b'p', b'c', 0, station as u8, path],
        ipv4: Ipv4Addr::new(10, net, path, host),
        ipv6: Ipv6Addr::new(0xfd00, net.into(), 0, path.into(), 0, 0, 0, host.into()),
    }
}

fn describe_path(number: u8, router: bool) -> PathDescription {
    if !router {
        return PathDescription {
            number,
            client: interface(Station::Client, number, 0, 1),
            server: interface(Station::Server, number, 0, 2),
            router: None,
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
    }
}

fn describe(name: &str, options: &Options) -> Description {
    Description {
        name: name.to_owned(),
        namespaces: Role::ALL
            .into_iter()
            .filter(|role| options.router || *role != Role::Router)
            .map(|role| (role, role.namespace(name)))
            .collect(),
        paths: (1..=options.paths)
            .map(|number| describe_path(number, options.router))
            .collect(),
    }
}

impl Interface {
    /// The MAC address as text, `02:70:63:00:01:01`.
    pub fn mac_text(&self) -> String {
        self.mac.map(|byte| format!("{byte:02x}")).join(":")
    }

    fn subnets(&self) -> [String; 2] {
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
    fn next_of_client(&self) -> &Interface {
        self.router.as_ref().map_or(&self.server, |it| &it.client)
    }

    /// What the server's packets reach first.
    fn next_of_server(&self) -> &Interface {
        self.router.as_ref().map_or(&self.client, |it| &it.server)
    }

    /// The devices of a host, each with the other end of its veth pair.
    fn links(&self, role: Role) -> Vec<Link<'_>> {
        let link = |own, peer_role, peer| Link {
            own,
            peer_role,
            peer,
        };
        let router = self.router.as_ref();
        let beyond_client = router.map_or(Role::Server, |_| Role::Router);
        let beyond_server = router.map_or(Role::Client, |_| Role::Router);
        match (role, router) {
            (Role::Client, _) => vec![link(&self.client, beyond_client, self.next_of_client())],
            (Role::Server, _) => vec![link(&self.server, beyond_server, self.next_of_server())],
            (Role::Router, Some(router)) => vec![
                link(&router.client, Role::Client, &self.client),
                link(&router.server, Role::Server, &self.server),
            ],
            (Role::Router, None) => Vec::new(),
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
        path.insert("server".into(), self.server.to_json());
        path.into()
    }
}

impl Description {
    /// `{"testbed", "namespaces": {ROLE: NAME}, "paths": [{"path", "client", "server"}]}`; with a
    /// router each path also has `"router": {"client", "server"}`. Ends are objects of `device`,
    /// `ifindex`, `mac`, `ipv4`, `ipv4_length`, `ipv6`, `ipv6_length`.
    pub fn to_json(&self) -> Value {
        let namespaces: Map<String, Value> = self
            .namespaces
            .iter()
            .map(|(role, namespace)| (role.to_string(), namespace.as_str().into()))
            .collect();
        let paths: Vec<Value> = self.paths.iter().map(PathDescription::to_json).collect();
        json!({ "testbed": self.name, "namespaces": namespaces, "paths": paths })
    }

    fn links(&self, role: Role) -> impl Iterator<Item = Link<'_>> {
        self.paths.iter().flat_map(move |path| path.links(role))
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
            for role in [Role::Client, Role::Router, Role::Server] {
                for Link { own, .. } in path.links(role) {
                    writeln!(f)?;
                    write_end(f, path.number, role, own)?;
                }
            }
        }
        Ok(())
    }
}

fn write_end(f: &mut fmt::Formatter<'_>, path: u8, role: Role, end: &Interface) -> fmt::Result {
    write_row(
        f,
        [
            &path.to_string(),
            role.name(),
            &end.device,
            &end.ifindex.to_string(),
            &format!("{}/{IPV4_LENGTH}", end.ipv4),
            &format!("{}/{IPV6_LENGTH}", end.ipv6),
            &end.mac_text(),
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

// ---- configuration ---------------------------------------------------------------------------

/// Settings of every host, under `/proc/sys/net`. Those of `default` are what devices made later
/// start with; of some, the kernel takes the greater or the union of `all` and the device's own.
const SETTINGS: [(&str, &str); 14] = [
    ("ipv4/conf/*/rp_filter", "0"),
    ("ipv4/conf/*/accept_redirects", "0"),
    ("ipv4/conf/*/send_redirects", "0"),
    ("ipv4/conf/*/arp_notify", "0"),
    ("ipv6/conf/*/disable_ipv6", "0"),
    // 1: no link-local address is generated.
    ("ipv6/conf/*/addr_gen_mode", "1"),
    ("ipv6/conf/*/accept_dad", "0"),
    ("ipv6/conf/*/dad_transmits", "0"),
    ("ipv6/conf/*/router_solicitations", "0"),
    ("ipv6/conf/*/accept_ra", "0"),
    ("ipv6/conf/*/accept_redirects", "0"),
    ("ipv6/conf/*/ndisc_notify", "0"),
    // Milliseconds, 24 days: the reports of multicast membership are not repeated.
    (
        "ipv6/conf/*/mldv1_unsolicited_report_interval",
        "2147483647",
    ),
    (
        "ipv6/conf/*/mldv2_unsolicited_report_interval",
        "2147483647",
    ),
];

/// Writes the settings of the calling thread's namespace, before it has devices.
fn write_settings(forward: bool) -> Result<()> {
    // First: changing it resets others.
    write_setting("ipv4/ip_forward", if forward { "1" } else { "0" })?;
    for scope in ["all", "default"] {
        let forwarding = format!("ipv6/conf/{scope}/forwarding");
        write_setting(&forwarding, if forward { "1" } else { "0" })?;
    }
    for (path, value) in SETTINGS {
        for scope in ["all", "default"] {
            write_setting(&path.replace('*', scope), value)?;
        }
    }
    Ok(())
}

fn write_setting(path: &str, value: &str) -> Result<()> {
    let file = Path::new("/proc/sys/net").join(path);
    fs::write(&file, value).map_err(|error| {
        let what = format!("cannot write {value} to {}", file.display());
        let advice = match error.kind() {
            io::ErrorKind::NotFound => "use a kernel with IPv6 (not booted with ipv6.disable=1)",
            _ => "run as root, with /proc/sys writable",
        };
        Refused::denied(what, error, advice).into()
    })
}

/// Makes the veth pairs and everything on them. The veth pairs are made from the first host's
/// namespace, with each end directly where it belongs.
fn configure(description: &Description, namespaces: &[(Role, Namespace)]) -> Result<()> {
    let mut pairs = pairs_script(description);
    // The router first: it is the one next to both others.
    for (role, namespace) in namespaces.iter().rev() {
        let script = std::mem::take(&mut pairs) + &host_script(description, *role);
        namespace.ip_batch(&script)?;
    }
    Ok(())
}

/// Commands that make all veth pairs, for the last of the description's hosts.
fn pairs_script(description: &Description) -> String {
    let Some((maker, _)) = description.namespaces.last() else {
        return String::new();
    };
    let mut script = String::new();
    for link in description.links(*maker) {
        let Link { own, peer, .. } = link;
        let namespace = link.peer_role.namespace(&description.name);
        // Writing to a String cannot fail.
        let _ = writeln!(
            script,
            "link add {} index {} address {} type veth \
             peer name {} index {} address {} netns {namespace}",
            own.device,
            own.ifindex,
            own.mac_text(),
            peer.device,
            peer.ifindex,
            peer.mac_text(),
        );
    }
    script
}

/// Commands that configure the devices of a host.
fn host_script(description: &Description, role: Role) -> String {
    let mut lines = vec!["link set dev lo up".to_owned()];
    for Link { own, peer, .. } in description.links(role) {
        let device = &own.device;
        let mac = peer.mac_text();
        lines.extend([
            format!("address add {}/{IPV4_LENGTH} dev {device}", own.ipv4),
            format!("address add {}/{IPV6_LENGTH} dev {device} nodad", own.ipv6),
            format!("link set dev {device} up"),
            format!(
                "neighbour add {} lladdr {mac} dev {device} nud permanent",
                peer.ipv4
            ),
            format!(
                "neighbour add {} lladdr {mac} dev {device} nud permanent",
                peer.ipv6
            ),
        ]);
    }
    for path in &description.paths {
        for destination in &description.paths {
            lines.extend(route_lines(role, path, destination));
        }
    }
    lines.join("\n") + "\n"
}

/// Commands for the routes of a host over `path` to the peer's address on the path `destination`.
fn route_lines(role: Role, path: &PathDescription, destination: &PathDescription) -> Vec<String> {
    let (own, next, goal) = match role {
        Role::Client => (&path.client, path.next_of_client(), &destination.server),
        Role::Server => (&path.server, path.next_of_server(), &destination.client),
        Role::Router => return Vec::new(),
    };
    let same = path.number == destination.number;
    if same && path.router.is_none() {
        return Vec::new();
    }
    let metric = match same {
        true => METRIC_SAME_PATH,
        false => METRIC_OTHER_PATH + u32::from(path.number),
    };
    let [ipv4, ipv6] = goal.subnets();
    let device = &own.device;
    vec![
        format!(
            "route add {ipv4} via {} dev {device} metric {metric}",
            next.ipv4
        ),
        format!(
            "route add {ipv6} via {} dev {device} metric {metric}",
            next.ipv6
        ),
    ]
}

/// Waits until every device has sent its report of multicast membership, which it does as soon as
/// it can send. A kernel that sends fewer only costs the time limit.
fn settle(description: &Description, namespaces: &[(Role, Namespace)]) -> Result<()> {
    let limit = Instant::now() + SETTLE_LIMIT;
    for (role, namespace) in namespaces {
        let devices: Vec<&str> = description
            .links(*role)
            .map(|link| link.own.device.as_str())
            .collect();
        namespace.enter(|| {
            while !all_have_sent(&devices) && Instant::now() < limit {
                thread::sleep(Duration::from_millis(2));
            }
        })?;
    }
    Ok(())
}

/// Whether each of the devices, of the calling thread's namespace, has sent a packet.
fn all_have_sent(devices: &[&str]) -> bool {
    let Ok(table) = fs::read_to_string("/proc/thread-self/net/dev") else {
        return false;
    };
    devices.iter().all(|device| {
        table
            .lines()
            .filter_map(|line| line.trim_start().split_once(':'))
            .find(|(name, _)| name == device)
            .and_then(|(_, counters)| counters.split_whitespace().nth(SENT_PACKETS))
            .is_some_and(|packets| packets != "0")
    })
}

/// Position of the sent packets among the counters in `/proc/net/dev`.
const SENT_PACKETS: usize = 9;

/// Number of paths by the devices in the client's namespace; 0 without one.
fn count_paths(namespaces: &[(Role, Namespace)]) -> Result<u8> {
    let Some((_, client)) = namespaces.iter().find(|(role, _)| *role == Role::Client) else {
        return Ok(0);
    };
    client.enter(|| {
        (1..=MAX_PATHS)
            .rev()
            .find(|number| has_device(&format!("path{number}")))
            .unwrap_or(0)
    })
}

/// Whether every host has all of its devices.
fn has_devices(description: &Description, namespaces: &[(Role, Namespace)]) -> Result<bool> {
    for (role, namespace) in namespaces {
        let mut links = description.links(*role);
        if !namespace.enter(|| links.all(|link| has_device(&link.own.device)))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the calling thread's namespace has the device.
fn has_device(device: &str) -> bool {
    if_nametoindex(device).is_ok()
}

// ---- tests' testbeds -------------------------------------------------------------------------

/// A testbed of one test: it has a name of its own and is removed when dropped.
///
/// Names are `scoped-PID-NUMBER`. The first one made in a process also removes those of processes
/// that no longer exist.
#[derive(Debug)]
pub struct ScopedTestbed(Testbed);

const SCOPED: &str = "scoped-";

impl ScopedTestbed {
    /// Makes the testbed.
    ///
    /// # Errors
    /// As [`Testbed::up`].
    pub fn up(options: &Options) -> Result<ScopedTestbed> {
        static COUNTER: AtomicU32 = AtomicU32::new(0);
        static SWEEP: Once = Once::new();
        SWEEP.call_once(remove_stale);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let name = format!("{SCOPED}{}-{number}", process::id());
        Ok(ScopedTestbed(Testbed::up(&name, options)?))
    }
}

impl Deref for ScopedTestbed {
    type Target = Testbed;

    fn deref(&self) -> &Testbed {
        &self.0
    }
}

impl Drop for ScopedTestbed {
    fn drop(&mut self) {
        // The test may have removed it.
        if existing(self.name()).is_empty() {
            return;
        }
        if let Err(error) = down(self.name()) {
            eprintln!("testbed {} stays: {error:#}", self.name());
        }
    }
}

/// Removes scoped testbeds whose process is gone. Another process may be doing the same, so
/// failures are not errors.
fn remove_stale() {
    for name in list().unwrap_or_default() {
        if scoped_owner(&name).is_some_and(|pid| !Path::new(&format!("/proc/{pid}")).exists()) {
            let _ = down(&name);
        }
    }
}

/// The process that made the scoped testbed `name`.
fn scoped_owner(name: &str) -> Option<u32> {
    let (pid, number) = name.strip_prefix(SCOPED)?.split_once('-')?;
    number.parse::<u32>().ok()?;
    pid.parse().ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};

    use super::*;
    use crate::error::{EXIT_FAILED, EXIT_INVALID, exit_code};

    const TIMEOUT: Duration = Duration::from_secs(5);

    fn options(paths: u8, router: bool) -> Options {
        Options { paths, router }
    }

    fn addresses(end: &Interface) -> [IpAddr; 2] {
        [end.ipv4.into(), end.ipv6.into()]
    }

    /// Sends 1 MB from the client's to the server's address and one byte back.
    fn transfer(testbed: &Testbed, source: IpAddr, destination: IpAddr) {
        let server = testbed.namespace(Role::Server).unwrap();
        let listener = server
            .enter(|| TcpListener::bind((destination, 0)).unwrap())
            .unwrap();
        let goal = listener.local_addr().unwrap();
        let receiver = thread::spawn(move || {
            let (mut stream, peer) = listener.accept().unwrap();
            stream.set_read_timeout(Some(TIMEOUT)).unwrap();
            let mut data = Vec::new();
            stream.read_to_end(&mut data).unwrap();
            stream.write_all(b"!").unwrap();
            (data.len(), peer.ip())
        });
        let client = testbed.namespace(Role::Client).unwrap();
        let mut stream = client
            .enter(|| TcpStream::connect_timeout(&goal, TIMEOUT))
            .unwrap()
            .unwrap_or_else(|error| panic!("{source} to {destination}: {error}"));
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.write_all(&vec![7; 1_000_000]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let mut answer = Vec::new();
        stream.read_to_end(&mut answer).unwrap();
        assert_eq!(answer, b"!");
        assert_eq!(receiver.join().unwrap(), (1_000_000, source));
    }

    fn udp_socket(namespace: &Namespace, address: IpAddr) -> UdpSocket {
        let socket = namespace
            .enter(|| UdpSocket::bind((address, 0)).unwrap())
            .unwrap();
        socket.set_read_timeout(Some(TIMEOUT)).unwrap();
        socket
    }

    /// Binds a socket to a device, as MPTCP does with a subflow of an endpoint that has one.
    fn bind_to_device(socket: &UdpSocket, device: &str) {
        let name = device.to_owned().into();
        nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::BindToDevice, &name)
            .unwrap();
    }

    /// A datagram there and back.
    fn echo(client: &UdpSocket, server: &UdpSocket) {
        let goal: SocketAddr = server.local_addr().unwrap();
        client.send_to(b"there", goal).unwrap();
        let mut buffer = [0; 16];
        let (length, source) = server.recv_from(&mut buffer).unwrap();
        assert_eq!(source, client.local_addr().unwrap());
        server.send_to(&buffer[..length], source).unwrap();
        assert_eq!(client.recv_from(&mut buffer).unwrap(), (length, goal));
    }

    fn read_inside(testbed: &Testbed, role: Role, file: &str) -> String {
        let path = format!("/proc/thread-self/net/{file}");
        let namespace = testbed.namespace(role).unwrap();
        namespace
            .enter(|| fs::read_to_string(path).unwrap())
            .unwrap()
    }

    /// Received and sent packets of every device.
    fn traffic(testbed: &Testbed) -> Vec<String> {
        let mut lines = Vec::new();
        for (role, _) in &testbed.describe().namespaces {
            for line in read_inside(testbed, *role, "dev").lines().skip(2) {
                let fields: Vec<&str> = line.split_whitespace().collect();
                lines.push(format!("{role} {} {} {}", fields[0], fields[2], fields[10]));
            }
        }
        lines
    }

    fn every_address_pair(options: Options) {
        let testbed = ScopedTestbed::up(&options).unwrap();
        let (client, server) = (Role::Client, Role::Server);
        let [client, server] = [client, server].map(|role| testbed.namespace(role).unwrap());
        for path in &testbed.describe().paths {
            let ends = addresses(&path.client)
                .into_iter()
                .zip(addresses(&path.server));
            for (source, destination) in ends {
                transfer(&testbed, source, destination);
            }
            for other in &testbed.describe().paths {
                let ends = addresses(&path.client)
                    .into_iter()
                    .zip(addresses(&other.server));
                for (source, destination) in ends {
                    let from = udp_socket(client, source);
                    bind_to_device(&from, &path.client.device);
                    echo(&from, &udp_socket(server, destination));
                }
            }
        }
        for role in [Role::Client, Role::Server] {
            let arp = read_inside(&testbed, role, "arp");
            let learned = arp.lines().skip(1).filter(|line| !line.contains("0x6"));
            assert_eq!(learned.count(), 0, "{arp}");
        }
    }

    #[test]
    fn two_paths_without_router() {
        every_address_pair(options(2, false));
    }

    #[test]
    fn two_paths_with_router() {
        every_address_pair(options(2, true));
    }

    #[test]
    fn the_router_forwards() {
        let testbed = ScopedTestbed::up(&options(1, true)).unwrap();
        let path = testbed.path(1).unwrap().clone();
        let before = traffic(&testbed);
        transfer(&testbed, path.client.ipv4.into(), path.server.ipv4.into());
        let after = traffic(&testbed);
        let changed = |device: &str| {
            let of = |lines: &[String]| lines.iter().find(|it| it.contains(device)).cloned();
            of(&before) != of(&after)
        };
        assert!(
            changed("router client1:") && changed("router server1:"),
            "{after:?}"
        );
        assert!(testbed.path(0).is_none() && testbed.path(2).is_none());
    }

    #[test]
    fn nothing_is_sent_unasked() {
        let testbeds = [
            ScopedTestbed::up(&options(1, false)).unwrap(),
            ScopedTestbed::up(&options(2, true)).unwrap(),
        ];
        let before = testbeds.each_ref().map(|testbed| traffic(testbed));
        thread::sleep(Duration::from_millis(2500));
        assert_eq!(testbeds.each_ref().map(|testbed| traffic(testbed)), before);
    }

    #[test]
    fn names_are_unique_and_nothing_stays() {
        let outside = || {
            let lines = fs::read_to_string("/proc/thread-self/net/dev").unwrap();
            let names = lines.lines().filter_map(|line| line.split_once(':'));
            names
                .map(|(name, _)| name.trim().to_owned())
                .collect::<Vec<_>>()
        };
        let devices = outside();
        let first = ScopedTestbed::up(&options(8, true)).unwrap();
        let second = ScopedTestbed::up(&Options::default()).unwrap();
        let names = [first.name().to_owned(), second.name().to_owned()];
        assert_ne!(names[0], names[1]);
        assert_eq!(outside(), devices);
        assert!(names.iter().all(|name| list().unwrap().contains(name)));
        let ids = [&first, &second].map(|it| it.namespace(Role::Client).unwrap().id());
        assert_ne!(ids[0], ids[1]);
        drop((first, second));
        assert!(names.iter().all(|name| existing(name).is_empty()));
        assert!(!list().unwrap().iter().any(|name| names.contains(name)));
        let gone = down(&names[0]).unwrap_err();
        assert_eq!(exit_code(&gone), EXIT_FAILED);
    }

    #[test]
    fn an_open_testbed_is_the_one_made() {
        let made = ScopedTestbed::up(&options(3, true)).unwrap();
        let opened = Testbed::open(made.name()).unwrap();
        assert_eq!(opened.describe(), made.describe());
        let again = Testbed::up(made.name(), &Options::default()).unwrap_err();
        assert!(again.to_string().contains("exists"), "{again}");
        assert_eq!(
            Testbed::open(made.name()).unwrap().describe().paths.len(),
            3
        );
    }

    #[test]
    fn half_a_testbed_can_only_be_removed() {
        let made = ScopedTestbed::up(&options(2, true)).unwrap();
        let name = made.name().to_owned();
        let client = made.namespace(Role::Client).unwrap();
        client.ip_batch("link del path1\n").unwrap();
        let error = Testbed::open(&name).unwrap_err();
        assert!(error.to_string().contains("missing"), "{error}");
        Namespace::remove(&Role::Client.namespace(&name)).unwrap();
        assert!(Testbed::open(&name).is_err());
        down(&name).unwrap();
        assert!(existing(&name).is_empty());
    }

    #[test]
    fn a_failed_up_leaves_nothing_of_its_own() {
        let name = format!("test-{}-failed", process::id());
        let server = Namespace::create(&Role::Server.namespace(&name)).unwrap();
        let mut making = Making::default();
        let client = Namespace::create(&Role::Client.namespace(&name)).unwrap();
        making.0.push((Role::Client, client));
        drop(making);
        assert_eq!(existing(&name), [Role::Server]);
        assert!(Testbed::up(&name, &Options::default()).is_err());
        assert_eq!(existing(&name), [Role::Server]);
        server.delete().unwrap();
        Testbed::up(&name, &Options::default()).unwrap();
        down(&name).unwrap();
    }

    #[test]
    fn stale_testbeds_are_removed() {
        let mut child = process::Command::new("true").spawn().unwrap();
        child.wait().unwrap();
        let stale = format!("{SCOPED}{}-0", child.id());
        let living = format!("{SCOPED}{}-999999", process::id());
        for name in [&stale, &living] {
            Namespace::create(&Role::Server.namespace(name)).unwrap();
        }
        remove_stale();
        let left = [&stale, &living].map(|name| existing(name).len());
        down(&living).unwrap();
        assert_eq!(left, [0, 1]);
    }

    #[test]
    fn exec_runs_on_the_host() {
        let testbed = ScopedTestbed::up(&Options::default()).unwrap();
        let id = testbed.namespace(Role::Server).unwrap().id();
        let script = format!("test $(readlink /proc/self/ns/net) = 'net:[{id}]' && exit 7");
        let status = testbed.exec(Role::Server, &["sh", "-c", &script]).unwrap();
        assert_eq!(status.code(), Some(7));
        let status = testbed.exec(Role::Client, &["sh", "-c", &script]).unwrap();
        assert_eq!(status.code(), Some(1));
        let missing = testbed
            .exec(Role::Client, &["no-such-program"])
            .unwrap_err();
        assert_eq!(exit_code(&missing), EXIT_FAILED);
        let router = testbed.exec(Role::Router, &["true"]).unwrap_err();
        assert!(router.to_string().contains("no router"), "{router}");
        let empty = testbed.exec::<&str>(Role::Client, &[]).unwrap_err();
        assert_eq!(exit_code(&empty), EXIT_INVALID);
    }

    #[test]
    fn names_and_numbers_are_checked() {
        let long = "x".repeat(33);
        for name in ["", "A", "a/b", "a.b", "ä", &long] {
            let error = Testbed::up(name, &Options::default()).unwrap_err();
            assert_eq!(exit_code(&error), EXIT_INVALID, "{name:?}");
            assert_eq!(exit_code(&down(name).unwrap_err()), EXIT_INVALID);
        }
        for paths in [0, 9] {
            let error = Testbed::up("unmade", &options(paths, false)).unwrap_err();
            assert_eq!(exit_code(&error), EXIT_INVALID);
        }
        assert_eq!(testbed_of("pc-a-client-server"), Some("a-client"));
        assert_eq!(testbed_of("pc-client"), None);
        assert_eq!("router".parse(), Ok(Role::Router));
        let error = "cleint".parse::<Role>().unwrap_err();
        assert!(error.found.contains("client"), "{error}");
    }

    #[test]
    fn description_as_table_and_json() {
        let name = "x".repeat(32);
        let description = describe(&name, &options(8, true));
        let table = description.to_string();
        assert!(table.lines().all(|line| line.len() <= 100), "{table}");
        assert_eq!(table.lines().count(), 1 + 3 + 1 + 1 + 4 * 8);
        let row =
            "8     router  server8  408    10.2.8.254/24  fd00:2:0:8::fe/64    02:70:63:00:04:08";
        assert!(table.contains(row), "{table}");
        let json = describe("demo", &options(1, false)).to_json();
        assert_eq!(json["namespaces"]["client"], "pc-demo-client");
        assert_eq!(json["paths"][0]["server"]["ipv6"], "fd00:0:0:1::2");
        assert_eq!(json["paths"][0].get("router"), None);
        assert_eq!(
            description.to_json()["paths"][7]["router"]["client"]["device"],
            "client8"
        );
    }
}
