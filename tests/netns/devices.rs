// SPDX-License-Identifier: MIT OR Apache-2.0
//! Packets sent out of other devices, and devices without a link header.

use std::fs::{self, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::os::unix::fs::OpenOptionsExt;

use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::capture::{Capture, MSS, Segment, TIMESTAMPS, parse};
use crate::common::traffic::{Connection, PORT, server_addresses, transfer_both};
use crate::common::{Environment, eventually, says};

/// Two paths. Path 1 is what routes say; the server takes its packets on path 2 too.
fn two_paths(hook: &str) -> Environment {
    let environment = Environment::routed_paths(2);
    if hook == "xdp" {
        // What a native XDP redirect needs: a peer that takes frames.
        environment.run(Role::Server, "ethtool", &["-K", "path2", "gro", "on"]);
    }
    environment
}

/// Chain `t` at the router's way in, for packets to the server's [`PORT`].
fn redirect_chain(hook: &str, parameters: Value) -> Value {
    let mut action = json!({ "action": "redirect" });
    let members = parameters.as_object().unwrap().clone();
    action.as_object_mut().unwrap().extend(members);
    json!({
        "version": 1,
        "chains": [{
            "name": "t",
            "attach": [{ "device": "client1", "hook": hook }],
            "selectors": [{ "selector": "service", "local_port": PORT }],
            "actions": [action],
        }],
    })
}

/// IPv4 and IPv6 packets that a host forwarded by its routes.
fn forwarded(environment: &Environment, role: Role) -> u64 {
    let read = |file: &str| {
        let path = format!("/proc/thread-self/net/{file}");
        let namespace = environment.namespace(role);
        namespace
            .enter(|| fs::read_to_string(path).unwrap())
            .unwrap()
    };
    let snmp = read("snmp");
    let mut lines = snmp.lines().filter(|line| line.starts_with("Ip:"));
    let names = lines.next().unwrap().split_whitespace();
    let (_, ipv4) = names
        .zip(lines.next().unwrap().split_whitespace())
        .find(|(name, _)| *name == "ForwDatagrams")
        .unwrap();
    let snmp6 = read("snmp6");
    let mut fields = snmp6.split_whitespace();
    fields
        .find(|field| *field == "Ip6OutForwDatagrams")
        .unwrap();
    ipv4.parse::<u64>().unwrap() + fields.next().unwrap().parse::<u64>().unwrap()
}

/// Runs connections; those segments to the server come by path 2 with this TTL, none by path 1,
/// and the router's stack forwards their answers only.
fn expect_on_path_2(environment: &Environment, ttl: u8) {
    let server = environment.namespace(Role::Server);
    let mut path1 = Capture::start(server, "path1");
    let mut path2 = Capture::start(server, "path2");
    let mut client = Capture::start(environment.namespace(Role::Client), "path1");
    let before = forwarded(environment, Role::Router);
    for address in server_addresses(environment) {
        Connection::open(environment, address, PORT).exchange(10);
    }
    eventually("what comes and what goes is counted", || {
        let counted = environment.packets(Role::Router, "t");
        let arrived = path2.with_port(PORT).len() as u64;
        let answers = client.segments().len() as u64;
        let routed = forwarded(environment, Role::Router) - before;
        (counted == arrived && routed == answers && counted >= 20).then_some(())
    });
    let mac = environment.testbed.path(2).unwrap().server.mac;
    for segment in path2.with_port(PORT) {
        assert_eq!(segment.ttl, ttl, "{segment:?}");
        assert_eq!(segment.destination_mac, mac);
        assert!(segment.checksum_is_right || environment.checksum_errors(Role::Server) == 0);
    }
    assert!(path1.with_port(PORT).is_empty());
    transfer_both(environment, 1 << 20);
    assert_eq!(environment.checksum_errors(Role::Server), 0);
    let shown = environment.json(Role::Router, &["show", "t", "--json"]);
    assert_eq!(
        shown["nodes"][0]["nodes"][1]["reasons"],
        json!({}),
        "{shown}"
    );
}

fn redirect_with_addresses(hook: &str) {
    let environment = two_paths(hook);
    let path = environment.testbed.path(2).unwrap();
    let router = path.router.as_ref().unwrap();
    let parameters = json!({
        "device": "server2",
        "src_mac": router.server.mac_text(),
        "dst_mac": path.server.mac_text(),
    });
    environment.apply(Role::Router, &redirect_chain(hook, parameters));
    expect_on_path_2(&environment, 64);
}

/// The next hop and its MAC address are those of the routing table, the TTL is a router's.
fn redirect_with_neighbour(hook: &str) {
    let environment = two_paths(hook);
    let mac = environment.testbed.path(2).unwrap().server.mac_text();
    let parameters = json!({ "device": "server2", "neighbour": true });
    environment.apply(Role::Router, &redirect_chain(hook, parameters));
    // The routes lead elsewhere: the packet is left to the stack.
    for address in server_addresses(&environment) {
        Connection::open(&environment, address, PORT).exchange(5);
    }
    let shown = environment.json(Role::Router, &["show", "t", "--json"]);
    let reasons = &shown["nodes"][0]["nodes"][1]["reasons"];
    assert!(reasons["no_route"].as_u64() >= Some(10), "{shown}");
    for address in server_addresses(&environment) {
        let length = if address.is_ipv4() { 32 } else { 128 };
        let script = format!(
            "route add {address}/{length} dev server2\n\
             neighbour add {address} lladdr {mac} dev server2 nud permanent\n"
        );
        environment
            .namespace(Role::Router)
            .ip_batch(&script)
            .unwrap();
    }
    // Counted anew.
    environment.ok(Role::Router, &["delete", "t"]);
    environment.apply(
        Role::Router,
        &redirect_chain(hook, json!({ "device": "server2", "neighbour": true })),
    );
    expect_on_path_2(&environment, 63);
}

#[test]
fn redirect_with_addresses_by_tc() {
    redirect_with_addresses("tc-ingress");
}

#[test]
fn redirect_with_addresses_by_xdp() {
    redirect_with_addresses("xdp");
}

#[test]
fn redirect_with_neighbour_by_tc() {
    redirect_with_neighbour("tc-ingress");
}

#[test]
fn redirect_with_neighbour_by_xdp() {
    redirect_with_neighbour("xdp");
}

/// Opens `tun0` in the namespace that the calling thread is in: packets without a link header. With
/// `IFF_NO_PI` they are read as they are, else behind flags and their protocol.
pub(super) fn open_tun(flags: libc::c_int) -> std::io::Result<File> {
    const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NONBLOCK)
        .open("/dev/net/tun")?;
    // SAFETY: an all-zero ifreq is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tun0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | flags) as libc::c_short;
    // SAFETY: TUNSETIFF takes an ifreq.
    match unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &request) } {
        0 => Ok(file),
        _ => Err(std::io::Error::last_os_error()),
    }
}

#[test]
fn tun_has_no_link_header() {
    let environment = Environment::direct();
    let namespace = environment.namespace(Role::Server);
    let mut tun = match namespace.enter(|| open_tun(libc::IFF_NO_PI)).unwrap() {
        Ok(tun) => tun,
        Err(error) if matches!(error.kind(), ErrorKind::NotFound | ErrorKind::Unsupported) => {
            eprintln!("not tested: this kernel has no tun devices ({error})");
            return;
        }
        Err(error) => panic!("tun: {error}"),
    };
    let script = "address add 10.9.0.1/24 dev tun0\nlink set tun0 up\n";
    namespace.ip_batch(script).unwrap();
    let chain = |hook: &str| {
        let port = if hook == "tc-egress" {
            "remote_port"
        } else {
            "local_port"
        };
        json!({
            "version": 1,
            "chains": [{
                "name": hook,
                "attach": [{ "device": "tun0", "hook": hook }],
                "selectors": [
                    { "selector": "prefix", "remote": "10.9.0.0/24" },
                    { "selector": "service", port: PORT },
                ],
                "actions": [
                    { "action": "strip_option", "kind": "timestamps" },
                    { "action": "set_mss", "bytes": 1000 },
                ],
            }],
        })
    };
    let file = environment.file("xdp.json", &chain("xdp"));
    let message = environment.fails(Role::Server, 1, &["apply", &file]);
    says(
        &message,
        &[
            "$.chains[0].attach[0]",
            "tun0 has no link header",
            "tc-ingress",
            "tc-egress",
        ],
    );
    environment.apply(Role::Server, &chain("tc-egress"));
    environment.apply(Role::Server, &chain("tc-ingress"));

    // Out: a SYN, which nobody answers.
    let connecting = namespace
        .enter(|| {
            std::thread::spawn(|| {
                let address = "10.9.0.2:5201".parse().unwrap();
                TcpStream::connect_timeout(&address, std::time::Duration::from_secs(2))
            })
        })
        .unwrap();
    let mut packet = [0; 2000];
    let syn = eventually("a SYN leaves by tun0", || {
        let length = tun.read(&mut packet).ok()?;
        let frame = [&[0; 12][..], &[8, 0], &packet[..length]].concat();
        (packet[0] >> 4 == 4).then(|| parse(&frame)).flatten()
    });
    assert!(syn.is_syn());
    assert_eq!(syn.option(TIMESTAMPS), None, "{syn:?}");
    assert_eq!(syn.option(MSS), Some(&1000u16.to_be_bytes()[..]));
    assert!(environment.packets(Role::Server, "tc-egress") >= 1);

    // In: a datagram that a socket receives.
    let socket = namespace
        .enter(|| UdpSocket::bind(("10.9.0.1", PORT)).unwrap())
        .unwrap();
    socket
        .set_read_timeout(Some(crate::common::DEADLINE))
        .unwrap();
    let mut datagram = Vec::new();
    etherparse::PacketBuilder::ipv4([10, 9, 0, 2], [10, 9, 0, 1], 64)
        .udp(9, PORT)
        .write(&mut datagram, b"in")
        .unwrap();
    tun.write_all(&datagram).unwrap();
    let mut received = [0; 16];
    assert_eq!(socket.recv(&mut received).unwrap(), 2);
    assert_eq!(environment.packets(Role::Server, "tc-ingress"), 1);
    drop(connecting.join().unwrap());
}

/// An option may make a segment longer, but not longer than the device of the hook sends.
#[test]
fn options_do_not_grow_past_the_mtu() {
    for (role, hook) in [
        (Role::Client, "tc-egress"),
        (Role::Server, "tc-ingress"),
        (Role::Server, "xdp"),
    ] {
        let environment = Environment::direct();
        let mut capture = Capture::start(environment.namespace(Role::Server), "path1");
        let [server, _] = server_addresses(&environment);
        let file = json!({ "version": 1, "chains": [{
            "name": "t",
            "attach": [{ "device": "path1", "hook": hook }],
            "actions": [{ "action": "insert_option", "kind": 253, "data": "00".repeat(18) }],
        }] });
        let counted = |reason: &str| {
            let shown = environment.json(role, &["show", "t", "--json"]);
            let node = &shown["nodes"][0]["nodes"][0];
            node["reasons"][reason].as_u64().unwrap_or(0)
        };
        // an ACK with timestamps has 52 bytes of IP, with 20 more 72
        for (mtu, fits) in [("71", false), ("72", true)] {
            for end in [Role::Client, Role::Server] {
                environment.run(end, "ip", &["link", "set", "path1", "mtu", mtu]);
            }
            environment.apply(role, &file);
            drop(Connection::open(&environment, server, PORT));
            eventually("a connection opened and closed", || {
                let taken = environment.packets(role, "t");
                (taken >= 3).then_some(())
            });
            // the SYN's 80 bytes would be too many in either case
            let syn = u64::from(fits);
            assert!(counted("no_room") >= 1, "{hook}, MTU {mtu}");
            if fits {
                assert!(counted("no_room") <= syn, "{hook}, MTU {mtu}");
            } else {
                assert!(counted("no_room") >= 3, "{hook}, MTU {mtu}");
            }
            if hook == "tc-egress" {
                let grown = |segment: &&Segment| segment.option(253).is_some();
                let segments = capture.with_port(PORT);
                assert_eq!(
                    segments.iter().any(|segment| grown(&segment)),
                    fits,
                    "MTU {mtu}"
                );
            }
            environment.ok(role, &["delete", "t"]);
        }
    }
}

/// Generic XDP has TC see packets that begin with IP, on kernels that copy them carelessly. They
/// are taken for what they are, or let pass and counted.
#[test]
fn generic_xdp_in_front_of_tc() {
    let environment = Environment::direct();
    let chain = |name: &str, hook: &str, mode: &str, selectors: Value, then: &str| {
        json!({
            "name": name,
            "attach": [{ "device": "path1", "hook": hook, "mode": mode }],
            "selectors": selectors,
            "actions": [{ "action": "set_mss", "bytes": 1000 }],
            "then": then,
        })
    };
    let tcp = json!([{ "selector": "tcp" }]);
    let others = json!([{ "selector": "tcp", "not": true }, { "selector": "flow" }]);
    let file = json!({ "version": 1, "chains": [
        chain("front", "xdp", "generic", json!([]), "continue"),
        chain("behind", "tc-ingress", "auto", tcp, "pass"),
        // nothing but TCP over IP comes here
        chain("mistaken", "tc-ingress", "auto", others, "drop"),
    ] });
    environment.apply(Role::Server, &file);
    let mut capture = Capture::start(environment.namespace(Role::Server), "path1");
    let [server, _] = server_addresses(&environment);
    Connection::open(&environment, server, PORT).exchange(10);
    transfer_both(&environment, 1 << 20);
    let arrived = |capture: &mut Capture| {
        let to_server = |segment: &&Segment| segment.destination_port == PORT;
        capture.with_port(PORT).iter().filter(to_server).count() as u64
    };
    let (matched, lost) = eventually("every segment matched or counted", || {
        let shown = environment.json(Role::Server, &["show", "behind", "--json"]);
        let matched = shown["packets"].as_u64().unwrap();
        let entry = &shown["nodes"][0]["entry"];
        let lost = entry["reasons"]["no_link_header"].as_u64().unwrap_or(0);
        (matched + lost >= arrived(&mut capture)).then_some((matched, lost))
    });
    println!("{matched} seen whole, {lost} without their link header");
    let mistaken = environment.json(Role::Server, &["show", "mistaken", "--json"]);
    let nodes = mistaken["nodes"][0]["nodes"].as_array().unwrap();
    assert_eq!(nodes[1]["packets"], 0, "{mistaken}");
}
