// SPDX-License-Identifier: MIT OR Apache-2.0
//! Testbeds: a client and a server in namespaces of their own, joined by one or more paths.
//!
//! Everything is fixed by the name, the number of paths and what is between the two: devices,
//! MAC and IP addresses, permanent neighbours, routes. There is no address detection, router
//! solicitation or neighbour discovery, so a capture holds what the test sent and nothing else.
//!
//! | | client | router | server |
//! |---|---|---|---|
//! | without router | `path1` 10.0.1.1 fd00:0:0:1::1 | | `path1` 10.0.1.2 fd00:0:0:1::2 |
//! | with router | `path1` 10.1.1.1 fd00:1:0:1::1 | `client1` 10.1.1.254 fd00:1:0:1::fe, `server1` 10.2.1.254 fd00:2:0:1::fe | `path1` 10.2.1.1 fd00:2:0:1::1 |
//!
//! With delays there is a relay in place of a router: client and server have the addresses of the
//! direct testbed, the relay's devices `client1` and `server1` none, and frames pass as they are.
//! Offloads are off, so they are no longer than the MTU, with complete checksums.
//!
//! Path 2 has a 2 in place of the last 1 of the names and of the third part of IPv4 and fourth
//! part of IPv6 addresses, and so on. Every device also has a route, less preferred, to the other
//! paths' subnets, so that a socket bound to one path's device reaches every address of the peer
//! (MPTCP's subflows are such sockets).

mod configure;
mod describe;
mod offload;
mod relay;
mod scoped;
#[cfg(test)]
mod tests;

use std::convert::Infallible;
use std::ffi::OsStr;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, ExitStatus};
use std::str::FromStr;
use std::time::Duration;
use std::{fmt, fs, io};

use anyhow::{Context, Result};
use nix::unistd::geteuid;

pub use self::describe::{
    Description, Interface, PathDescription, Port, RelayPorts, Role, RouterInterfaces,
};
pub use self::relay::{Relay, run_relay};
pub use self::scoped::ScopedTestbed;
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

/// The kernel has room for eight addresses, two a path.
const MAX_MPTCP_PATHS: u8 = 5;
/// Gbit/s are beyond what veth pairs do.
const MAX_RATE: u32 = 100_000;
const MAX_DELAY: Duration = Duration::from_secs(2);

/// How MPTCP gets to know of the paths after the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Announce {
    /// The server announces its addresses (ADD_ADDR), and the client joins them.
    Signal,
    /// The client joins from its addresses.
    Subflow,
}

impl Announce {
    pub const ALL: [Announce; 2] = [Announce::Signal, Announce::Subflow];

    pub fn name(self) -> &'static str {
        match self {
            Announce::Signal => "signal",
            Announce::Subflow => "subflow",
        }
    }
}

impl fmt::Display for Announce {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Announce {
    type Err = Invalid;

    fn from_str(text: &str) -> Result<Self, Invalid> {
        let near = || did_you_mean(text, Announce::ALL.map(Announce::name));
        let mut all = Announce::ALL.into_iter();
        all.find(|it| it.name() == text).ok_or_else(|| {
            let found = format!("\"{text}\"{}", near());
            Invalid::new("--mptcp", found, "signal or subflow")
        })
    }
}

/// What a testbed is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Options {
    /// Paths between client and server, 1 to [`MAX_PATHS`].
    pub paths: u8,
    /// Whether every path goes through a forwarding host.
    pub router: bool,
    /// Whether client and server speak MPTCP over all paths, 5 at most.
    pub mptcp: Option<Announce>,
    /// Round trip time added, half of it each way: none, one for all paths, or one a path.
    pub delay: Vec<Duration>,
    /// Mbit/s that client and server can send: no limit, one for all paths, or one a path.
    pub rate: Vec<u32>,
}

impl Default for Options {
    /// One path, nothing else.
    fn default() -> Self {
        Options {
            paths: 1,
            router: false,
            mptcp: None,
            delay: Vec::new(),
            rate: Vec::new(),
        }
    }
}

impl Options {
    fn check(&self) -> Result<(), Invalid> {
        let (most, why) = match self.mptcp {
            Some(_) => (MAX_MPTCP_PATHS, " with MPTCP"),
            None => (MAX_PATHS, ""),
        };
        if !(1..=most).contains(&self.paths) {
            let expected = format!("1 to {most}{why}");
            return Err(Invalid::new("--paths", self.paths, expected));
        }
        self.check_count("--delay", self.delay.len())?;
        self.check_count("--rate", self.rate.len())?;
        if self.router && !self.delay.is_empty() {
            let invalid = Invalid::new("--delay", "a router too", "a testbed without router");
            return Err(invalid.advice("leave out --router or --delay"));
        }
        for delay in &self.delay {
            check_delay(*delay)?;
        }
        if let Some(rate) = self.rate.iter().find(|it| !(1..=MAX_RATE).contains(*it)) {
            let expected = format!("1 to {MAX_RATE} Mbit/s");
            return Err(Invalid::new("--rate", rate, expected));
        }
        Ok(())
    }

    fn check_count(&self, argument: &str, count: usize) -> Result<(), Invalid> {
        if count <= 1 || count == usize::from(self.paths) {
            return Ok(());
        }
        let expected = match self.paths {
            1 => "one value".to_owned(),
            paths => format!("one value, or one for each of {paths} paths"),
        };
        Err(Invalid::new(argument, format!("{count} values"), expected))
    }
}

fn check_delay(delay: Duration) -> Result<(), Invalid> {
    if delay <= MAX_DELAY {
        return Ok(());
    }
    let expected = format!("0 to {} ms", MAX_DELAY.as_millis());
    Err(Invalid::new(
        "--delay",
        format!("{} ms", delay.as_millis()),
        expected,
    ))
}

/// A complete testbed. Dropping it leaves it up; see [`down`] and [`ScopedTestbed`].
#[derive(Clone, Debug)]
pub struct Testbed {
    description: Description,
    namespaces: Vec<(Role, Namespace)>,
}

impl Testbed {
    /// Makes the testbed `name`; if that fails, nothing stays. Afterwards the devices are ready
    /// to send and have sent what they send unasked (reports of multicast membership). With a
    /// delay, frames arrive once a relay is at work: [`Testbed::relay`], [`Testbed::start_relay`].
    ///
    /// # Errors
    /// [`Invalid`] for a bad name or option. [`Refused`] (state) if one of its
    /// namespaces exists or iproute2 is missing, (denied) without root or kernel support.
    pub fn up(name: &str, options: &Options) -> Result<Testbed> {
        check_name(name)?;
        options.check()?;
        if !existing(name).is_empty() {
            return Err(Refused::state(
                format!("cannot make testbed {name}"),
                "it exists, maybe in parts",
                format!("remove it with: policy-chain testbed down {name}"),
            )
            .into());
        }
        let relay = !options.delay.is_empty();
        let description = describe::describe(name, options.paths, options.router, relay);
        let mut making = Making::default();
        for (role, namespace) in &description.namespaces {
            making.0.push((*role, Namespace::create(namespace)?));
        }
        for (role, namespace) in &making.0 {
            namespace.enter(|| configure::write_settings(*role, options))??;
        }
        configure::configure(&description, &making.0, options)?;
        if relay {
            for (role, namespace) in &making.0 {
                let devices = description.devices(*role);
                namespace.enter(|| devices.into_iter().try_for_each(offload::turn_off))??;
            }
            relay::keep(name, configure::per_path(&options.delay))?;
        }
        configure::settle(&description, &making.0)?;
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
        let has = |wanted| namespaces.iter().any(|(role, _)| *role == wanted);
        let (router, relay) = (has(Role::Router), has(Role::Relay));
        let paths = configure::count_paths(&namespaces)?;
        let description = describe::describe(name, paths, router, relay);
        let complete = paths > 0 && namespaces.len() == description.namespaces.len();
        if !complete || !configure::has_devices(&description, &namespaces)? {
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
    /// [`Refused`] (state) for the router or relay of a testbed without one.
    pub fn namespace(&self, role: Role) -> Result<&Namespace> {
        self.namespaces
            .iter()
            .find(|(other, _)| *other == role)
            .map(|(_, namespace)| namespace)
            .ok_or_else(|| {
                let name = self.name();
                let option = match role {
                    Role::Relay => "--delay MS".to_owned(),
                    _ => format!("--{role}"),
                };
                Refused::state(
                    format!("testbed {name} has no {role}"),
                    "it was made without one",
                    format!(
                        "make it anew: policy-chain testbed down {name}, then \
                         policy-chain testbed up {name} {option}"
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
    removals.into_iter().collect::<Result<()>>()?;
    relay::end(name)
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
