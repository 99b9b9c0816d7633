// SPDX-License-Identifier: MIT OR Apache-2.0
//! Settings, devices, addresses and routes of a testbed's hosts.

use std::fmt::Write as _;
use std::path::Path;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use anyhow::Result;
use nix::net::if_::if_nametoindex;

use super::describe::{Description, Link, Pair, PathDescription, Role};
use super::{Announce, IPV4_LENGTH, IPV6_LENGTH, MAX_PATHS, Options};
use crate::error::Refused;
use crate::netns::Namespace;

/// Metric of the route to the peer's subnet of the same path.
const METRIC_SAME_PATH: u32 = 100;
/// Metric of the routes to the peer's other subnets, plus the path; above the 1024 that IPv6
/// routes get by default.
const METRIC_OTHER_PATH: u32 = 2000;

/// Longest wait for the multicast reports of fresh devices.
const SETTLE_LIMIT: Duration = Duration::from_millis(500);

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

/// Those of MPTCP for client and server. Without the first two a kernel has no MPTCP, or one that
/// tests cannot wait for. The third, of later kernels, would turn it off for an hour after three
/// lost SYNs.
const MPTCP_SETTINGS: [(&str, &str); 3] = [
    ("mptcp/enabled", "1"),
    ("mptcp/add_addr_timeout", "2"),
    ("mptcp/blackhole_timeout", "0"),
];

/// Makes throughput comparable from one kernel to the next, where it can be set.
const CONGESTION_CONTROL: (&str, &str) = ("ipv4/tcp_congestion_control", "reno");

/// Writes the settings of the calling thread's namespace, before it has devices.
pub(super) fn write_settings(role: Role, options: &Options) -> Result<()> {
    let forward = if role == Role::Router { "1" } else { "0" };
    // First: changing it resets others.
    write_setting("ipv4/ip_forward", forward)?;
    for scope in ["all", "default"] {
        write_setting(&format!("ipv6/conf/{scope}/forwarding"), forward)?;
    }
    for (path, value) in SETTINGS {
        for scope in ["all", "default"] {
            write_setting(&path.replace('*', scope), value)?;
        }
    }
    if role == Role::Relay {
        // It says nothing of its own.
        write_setting("ipv6/conf/default/disable_ipv6", "1")?;
    }
    if options.mptcp.is_some() && matches!(role, Role::Client | Role::Server) {
        let [enabled, timeout, blackhole] = MPTCP_SETTINGS;
        write_setting(enabled.0, enabled.1)?;
        write_setting(timeout.0, timeout.1)?;
        for (path, value) in [blackhole, CONGESTION_CONTROL] {
            let _ = write_setting(path, value);
        }
    }
    Ok(())
}

fn write_setting(path: &str, value: &str) -> Result<()> {
    let file = Path::new("/proc/sys/net").join(path);
    fs::write(&file, value).map_err(|error| {
        let what = format!("cannot write {value} to {}", file.display());
        let advice = match error.kind() {
            io::ErrorKind::NotFound if path.starts_with("mptcp/") => {
                "this kernel lacks MPTCP: use one with CONFIG_MPTCP, 5.13 or later"
            }
            io::ErrorKind::NotFound => "use a kernel with IPv6 (not booted with ipv6.disable=1)",
            _ => "run as root, with /proc/sys writable",
        };
        Refused::denied(what, error, advice).into()
    })
}

/// Makes the veth pairs and everything on them. The veth pairs are made from the namespace of the
/// last host, with each end directly where it belongs.
pub(super) fn configure(
    description: &Description,
    namespaces: &[(Role, Namespace)],
    options: &Options,
) -> Result<()> {
    let mut pairs = pairs_script(description);
    // The router or relay first: it is the one next to both others.
    for (role, namespace) in namespaces.iter().rev() {
        let mut script = std::mem::take(&mut pairs) + &host_script(description, *role);
        if let Some(announce) = options.mptcp {
            script += &mptcp_script(description, *role, announce);
        }
        namespace.ip_batch(&script)?;
        let rates = rates_script(description, *role, &options.rate);
        if !rates.is_empty() {
            namespace.tc_batch(&rates)?;
        }
    }
    Ok(())
}

/// Commands that have MPTCP use the paths after the first.
fn mptcp_script(description: &Description, role: Role, announce: Announce) -> String {
    let teller = match announce {
        Announce::Signal => Role::Server,
        Announce::Subflow => Role::Client,
    };
    if !matches!(role, Role::Client | Role::Server) {
        return String::new();
    }
    // An announced address counts even if the connection is of the other family.
    let limit = if description.paths.len() > 3 { 8 } else { 4 };
    let mut script = format!("mptcp limits set subflow {limit} add_addr_accepted {limit}\n");
    let links = description.links(role).skip(1);
    for Link { own, .. } in links.filter(|_| role == teller) {
        let device = &own.device;
        // Writing to a String cannot fail.
        let _ = writeln!(
            script,
            "mptcp endpoint add {} dev {device} {announce}\n\
             mptcp endpoint add {} dev {device} {announce}",
            own.ipv4, own.ipv6
        );
    }
    script
}

/// Commands of `tc` that limit what client and server send.
fn rates_script(description: &Description, role: Role, rates: &[u32]) -> String {
    if !matches!(role, Role::Client | Role::Server) {
        return String::new();
    }
    let links = description.links(role).zip(per_path(rates));
    links
        .map(|(Link { own, .. }, rate)| {
            let device = &own.device;
            format!("qdisc add dev {device} root tbf rate {rate}mbit burst 64kb latency 50ms\n")
        })
        .collect()
}

/// One value a path: a single one is for all.
pub(super) fn per_path<T: Copy>(values: &[T]) -> impl Iterator<Item = T> {
    let repeated = if values.len() == 1 {
        usize::from(MAX_PATHS)
    } else {
        1
    };
    values.iter().copied().cycle().take(values.len() * repeated)
}

/// Commands that make all veth pairs, for the last of the description's hosts, which has an end of
/// each.
fn pairs_script(description: &Description) -> String {
    let mut script = String::new();
    for Pair((_, own), (role, peer)) in description.paths.iter().flat_map(PathDescription::pairs) {
        let namespace = role.namespace(&description.name);
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
    for Link { own, peer } in description.links(role) {
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
    if role == Role::Relay {
        let devices = description.devices(role);
        lines.extend(devices.map(|device| format!("link set dev {device} up")));
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
        Role::Router | Role::Relay => return Vec::new(),
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
pub(super) fn settle(description: &Description, namespaces: &[(Role, Namespace)]) -> Result<()> {
    let limit = Instant::now() + SETTLE_LIMIT;
    for (role, namespace) in namespaces {
        // The relay's have no IPv6.
        let links = description.links(*role);
        let devices: Vec<&str> = links.map(|link| link.own.device.as_str()).collect();
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
pub(super) fn count_paths(namespaces: &[(Role, Namespace)]) -> Result<u8> {
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
pub(super) fn has_devices(
    description: &Description,
    namespaces: &[(Role, Namespace)],
) -> Result<bool> {
    for (role, namespace) in namespaces {
        let mut devices = description.devices(*role);
        if !namespace.enter(|| devices.all(has_device))? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the calling thread's namespace has the device.
fn has_device(device: &str) -> bool {
    if_nametoindex(device).is_ok()
}
