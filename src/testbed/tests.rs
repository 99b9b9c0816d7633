// SPDX-License-Identifier: MIT OR Apache-2.0
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{Read, Write};
use std::net::{IpAddr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::OwnedFd;

use std::time::Instant;
use std::{process, thread};

use super::configure::per_path;
use super::describe::describe;
use super::scoped::{SCOPED, remove_stale};
use super::*;
use crate::error::{EXIT_FAILED, EXIT_INVALID, exit_code};
use crate::packet_socket;

const TIMEOUT: Duration = Duration::from_secs(5);

fn options(paths: u8, router: bool) -> Options {
    Options {
        paths,
        router,
        ..Options::default()
    }
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
    nix::sys::socket::setsockopt(socket, nix::sys::socket::sockopt::BindToDevice, &name).unwrap();
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
    let description = describe(&name, 8, true, false);
    let table = description.to_string();
    assert!(table.lines().all(|line| line.len() <= 100), "{table}");
    assert_eq!(table.lines().count(), 1 + 3 + 1 + 1 + 4 * 8);
    let row = "8     router  server8  408    10.2.8.254/24  fd00:2:0:8::fe/64    02:70:63:00:04:08";
    assert!(table.contains(row), "{table}");
    let json = describe("demo", 1, false, false).to_json();
    assert_eq!(json["namespaces"]["client"], "pc-demo-client");
    assert_eq!(json["paths"][0]["server"]["ipv6"], "fd00:0:0:1::2");
    assert_eq!(json["paths"][0].get("router"), None);
    assert_eq!(
        description.to_json()["paths"][7]["router"]["client"]["device"],
        "client8"
    );
}

#[test]
fn one_value_is_for_all_paths() {
    let taken = |values: &[u32]| per_path(values).take(3).collect::<Vec<_>>();
    assert!(taken(&[]).is_empty());
    assert_eq!(taken(&[7]), [7, 7, 7]);
    assert_eq!(taken(&[1, 2, 3]), [1, 2, 3]);
}

fn delayed(milliseconds: &[u64]) -> ScopedTestbed {
    let delay = milliseconds.iter().copied().map(Duration::from_millis);
    let delay: Vec<Duration> = delay.collect();
    let paths = delay.len() as u8;
    ScopedTestbed::up(&Options {
        delay,
        ..options(paths, false)
    })
    .unwrap()
}

#[test]
fn every_address_pair_through_a_relay() {
    every_address_pair(Options {
        delay: vec![Duration::from_millis(1)],
        ..options(2, false)
    });
}

/// A socket for whole frames of a host's first path.
fn frames_of(testbed: &Testbed, role: Role) -> OwnedFd {
    let path = testbed.path(1).unwrap();
    let end = if role == Role::Client {
        &path.client
    } else {
        &path.server
    };
    let open = || {
        let socket = packet_socket::open().unwrap();
        for option in [libc::PACKET_AUXDATA, libc::PACKET_IGNORE_OUTGOING] {
            packet_socket::set_option(&socket, libc::SOL_PACKET, option, 1).unwrap();
        }
        packet_socket::bind(&socket, end.ifindex, libc::ETH_P_ALL as u16).unwrap();
        socket
    };
    testbed.namespace(role).unwrap().enter(open).unwrap()
}

/// Frames of any length, kind and tag, and to anybody.
#[test]
fn the_relay_changes_no_frame() {
    let testbed = delayed(&[2]);
    let ends = [Role::Client, Role::Server].map(|role| frames_of(&testbed, role));
    let addresses = [2, 0, 0, 0, 0, 0xee, 2, 0, 0, 0, 0, 0xef];
    let frame = |types: &[u8], length: usize| {
        let mut frame = [&addresses[..], types].concat();
        frame.resize(length, length as u8);
        frame
    };
    let frames = [
        frame(&[0x88, 0xb5], 14),
        frame(&[0x88, 0xb5], 60),
        frame(&[0x88, 0xb5], 1514),
        frame(&[0x81, 0x00, 0x60, 7, 0x88, 0xb5], 64),
        frame(&[0x81, 0x00, 0, 7, 0x81, 0x00, 0, 9, 0x88, 0xb5], 1000),
        frame(&[0x88, 0xa8, 0, 7, 0x81, 0x00, 0, 9, 0x88, 0xb5], 1000),
        frame(&[0x00, 0x2e], 60),
    ];
    for (from, to) in [(&ends[0], &ends[1]), (&ends[1], &ends[0])] {
        for frame in &frames {
            nix::unistd::write(from, frame).unwrap();
        }
        let limit = Instant::now() + TIMEOUT;
        let mut buffer = vec![0; 4096];
        for frame in &frames {
            let seen = loop {
                assert!(Instant::now() < limit, "{frame:02x?}");
                match packet_socket::receive(to, &mut buffer).unwrap() {
                    Some(seen) if seen.bytes.starts_with(&addresses) => break seen.bytes,
                    Some(_) => {}
                    None => thread::sleep(Duration::from_millis(1)),
                }
            };
            assert_eq!(&seen, frame);
        }
    }
}

#[test]
fn delays_are_held_and_change() {
    let testbed = delayed(&[30, 10]);
    let round_trip = |path: u8| {
        let path = testbed.path(path).unwrap();
        let socket =
            |role, end: &Interface| udp_socket(testbed.namespace(role).unwrap(), end.ipv4.into());
        let client = socket(Role::Client, &path.client);
        let server = socket(Role::Server, &path.server);
        let measure = || {
            let start = Instant::now();
            echo(&client, &server);
            start.elapsed()
        };
        (0..10).map(|_| measure()).min().unwrap().as_millis()
    };
    assert!((30..33).contains(&round_trip(1)));
    assert!((10..13).contains(&round_trip(2)));
    testbed.set_delay(1, Duration::ZERO).unwrap();
    thread::sleep(Duration::from_millis(100));
    assert!((0..3).contains(&round_trip(1)));
    assert!((10..13).contains(&round_trip(2)));
    let error = testbed.set_delay(3, Duration::ZERO).unwrap_err();
    assert_eq!(exit_code(&error), EXIT_INVALID);
}

#[test]
fn a_relay_in_table_and_json() {
    let description = describe("demo", 8, false, true);
    let table = description.to_string();
    assert!(table.lines().all(|line| line.len() <= 100), "{table}");
    let row = "8     relay   server8  608    -              -                    02:70:63:00:06:08";
    assert!(table.contains(row), "{table}");
    let json = description.to_json();
    assert_eq!(json["namespaces"]["relay"], "pc-demo-relay");
    assert_eq!(json["paths"][0]["client"]["ipv4"], "10.0.1.1");
    let port = &json["paths"][7]["relay"]["client"];
    assert_eq!(port["mac"], "02:70:63:00:05:08");
    assert_eq!(port.get("ipv4"), None);
}

#[test]
fn a_relayed_testbed_is_opened_and_leaves_no_file() {
    let made = delayed(&[1, 2]);
    let file = format!("/run/policy-chain/{}.delays", made.name());
    assert_eq!(fs::read(&file).unwrap().len(), 16);
    let opened = Testbed::open(made.name()).unwrap();
    assert_eq!(opened.describe(), made.describe());
    drop(made);
    assert!(!Path::new(&file).exists());
    let error = opened.set_delay(1, Duration::ZERO).unwrap_err();
    assert_eq!(exit_code(&error), EXIT_FAILED);
}
