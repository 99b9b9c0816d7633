// SPDX-License-Identifier: MIT OR Apache-2.0
//! What the testbed promises: connections join all paths, and paths are as slow as asked for.

use std::cell::Cell;
use std::fs;
use std::net::IpAddr;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::process::{Command, Output};
use std::thread;
use std::time::Duration;

use policy_chain::netns::Namespace;
use policy_chain::testbed::{Announce, Options, Role, Testbed};
use serde_json::Value;

use crate::common::capture::Capture;
use crate::common::load::expect_rate;
use crate::common::mptcp::{
    Control, Differs, MptcpConnection, Subflow, exact, exact_beside, exact_on, mptcp_options, say,
};
use crate::common::traffic::{PORT, server_addresses};
use crate::common::{Environment, PROGRAM, eventually, failed, require_root, says, succeeded};

/// Over IPv4 and IPv6, every path has a subflow that carries something.
fn joins(options: &Options) {
    let environment = Environment::with(options);
    let paths = options.paths.into();
    for address in server_addresses(&environment) {
        exact_on(options, || {
            let connection = MptcpConnection::joined(&environment, address);
            assert!(connection.is_mptcp());
            let subflows = connection.wait_subflows(&environment, Role::Server, paths);
            for (subflow, number) in subflows.iter().zip(1..) {
                assert_eq!(subflow.path(), number, "{subflows:#?}");
                assert_eq!(subflow.is_joined(), number > 1, "{subflows:#?}");
                assert!(!subflow.is_backup_by_peer(), "{subflows:#?}");
            }
            let info = connection.info(Role::Client).unwrap();
            assert_eq!(usize::from(info.subflows) + 1, paths);
            assert_ne!(
                connection.token(Role::Client),
                connection.token(Role::Server)
            );
            connection.exchange(10)?;
            connection.transfer(1 << 20)?;
            connection.fetch(1 << 20)
        });
    }
    let joined = environment.counter(Role::Server, "MPTcpExt", "MPJoinAckRx");
    assert!(joined >= 2 * (u64::from(options.paths) - 1), "{joined}");
    let announced = environment.counter(Role::Client, "MPTcpExt", "AddAddr");
    assert_eq!(
        announced > 0,
        options.mptcp == Some(Announce::Signal),
        "{announced}"
    );
}

#[test]
fn two_paths_announced_by_the_server() {
    joins(&mptcp_options(2, Announce::Signal));
}

#[test]
fn three_paths_announced_by_the_server() {
    joins(&mptcp_options(3, Announce::Signal));
}

#[test]
fn two_paths_joined_by_the_client() {
    joins(&mptcp_options(2, Announce::Subflow));
}

#[test]
fn three_paths_joined_by_the_client() {
    joins(&mptcp_options(3, Announce::Subflow));
}

#[test]
fn through_a_router() {
    for announce in Announce::ALL {
        joins(&Options {
            router: true,
            ..mptcp_options(2, announce)
        });
    }
}

#[test]
fn five_paths() {
    for announce in Announce::ALL {
        joins(&mptcp_options(5, announce));
    }
}

/// Paths of different rates add up.
#[test]
fn rates() {
    let options = Options {
        rate: vec![40, 20],
        ..mptcp_options(2, Announce::Subflow)
    };
    let environment = Environment::with(&options);
    for address in server_addresses(&environment) {
        exact_on(&options, || {
            let connection = MptcpConnection::joined(&environment, address);
            expect_rate(36.0..72.0, || connection.transfer(8 << 20))?;
            expect_rate(36.0..72.0, || connection.fetch(8 << 20))
        });
    }
}

fn delayed(delay: &[u64], options: Options) -> Environment {
    Environment::with(&Options {
        delay: delay.iter().copied().map(Duration::from_millis).collect(),
        ..options
    })
}

/// Whether the least round trip times of the subflows are the delays, to 5 % (2 % below).
fn are_close(subflows: &[Subflow], delays: &[u64]) -> bool {
    let ratios = subflows.iter().zip(delays).map(|(subflow, delay)| {
        let delay = Duration::from_millis(*delay);
        subflow.min_rtt.as_secs_f64() / delay.as_secs_f64()
    });
    let ratios: Vec<f64> = ratios.collect();
    assert!(ratios.iter().all(|it| *it > 0.98), "too early: {ratios:?}");
    let close = ratios.len() == delays.len() && ratios.iter().all(|it| *it < 1.05);
    if !close {
        eprintln!("round trips over delays: {ratios:?}");
    }
    close
}

/// Other work on this machine makes some round trips longer, none shorter.
fn wait_close(environment: &Environment, server: IpAddr, delays: &[u64]) {
    exact(|| {
        let connection = MptcpConnection::joined(environment, server);
        let talk = || {
            connection.exchange(2)?;
            connection.transfer(1 << 20)?;
            connection.fetch(1 << 20)
        };
        for role in [Role::Client, Role::Server] {
            eventually(&format!("round trips of {delays:?} ms"), || {
                let talked = talk();
                let subflows = connection.subflows(environment, role);
                (talked.is_err() || are_close(&subflows, delays)).then_some(talked)
            })?;
        }
        Ok(())
    });
}

#[test]
fn delays_are_exact_and_change() {
    let delays = [20, 5];
    let environment = delayed(&delays, mptcp_options(2, Announce::Subflow));
    for address in server_addresses(&environment) {
        wait_close(&environment, address, &delays);
    }
    let testbed = &environment.testbed;
    testbed.set_delay(2, Duration::from_millis(40)).unwrap();
    thread::sleep(Duration::from_millis(100));
    wait_close(&environment, server_addresses(&environment)[0], &[20, 40]);
    assert!(testbed.set_delay(3, Duration::ZERO).is_err());
    assert!(testbed.set_delay(1, Duration::from_secs(3)).is_err());
}

/// Segments are as on a wire, whole, and none is lost.
#[test]
fn rate_with_delay() {
    let options = Options {
        rate: vec![100],
        ..Options::default()
    };
    let environment = delayed(&[20], options);
    let mut capture = Capture::start(environment.namespace(Role::Server), "path1");
    exact(|| {
        let connection =
            MptcpConnection::open(&environment, server_addresses(&environment)[0], PORT);
        expect_rate(60.0..120.0, || connection.transfer(16 << 20))?;
        expect_rate(60.0..120.0, || connection.fetch(16 << 20))
    });
    assert!(capture.segments().iter().all(|it| it.checksum_is_right));
    assert!(capture.frames().iter().all(|it| it.len() <= 1514));
    assert!(capture.with_port(PORT).len() > 10_000);
    let lost = environment.counter(Role::Client, "Tcp", "RetransSegs");
    assert!(lost < 100, "{lost}");
    for role in [Role::Client, Role::Server] {
        assert_eq!(environment.checksum_errors(role), 0);
    }
}

/// Runs the program under test outside of any testbed.
fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

/// Processes that are the relay of a testbed.
fn relays(name: &str) -> usize {
    let end = format!("\0testbed\0relay\0{name}\0");
    let processes = fs::read_dir("/proc").unwrap().flatten();
    let commands = processes.filter_map(|it| fs::read_to_string(it.path().join("cmdline")).ok());
    commands.filter(|command| command.ends_with(&end)).count()
}

/// A testbed made by the program, removed when dropped if it is there.
struct Made(String);

impl Drop for Made {
    fn drop(&mut self) {
        run(&["testbed", "down", &self.0]);
    }
}

#[test]
fn the_relay_is_a_process_that_ends_with_its_testbed() {
    require_root();
    // Of a killed test, the next one removes what is called so.
    let made = Made(format!("scoped-{}-{}", std::process::id(), u32::MAX));
    let name = &made.0;
    let up = [
        "testbed",
        "up",
        name,
        "--paths=2",
        "--mptcp=signal",
        "--delay=1,2.5",
        "--json",
    ];
    let described: Value = serde_json::from_str(&succeeded("up", &run(&up))).unwrap();
    assert_eq!(described["paths"][1]["relay"]["server"]["ifindex"], 602);
    assert_eq!(relays(name), 1);
    let again = failed("relay", 1, &run(&["testbed", "relay", name]));
    says(&again, &["it has one at work"]);
    let set = ["testbed", "set", name, "--path=2", "--delay=3"];
    assert_eq!(succeeded("set", &run(&set)), "path 2: 3 ms\n");
    let opened = Testbed::open(name).unwrap();
    assert_eq!(opened.describe().to_json(), described);
    drop(opened);
    succeeded("down", &run(&["testbed", "down", name]));
    eventually("the relay ends", || (relays(name) == 0).then_some(()));

    succeeded("up", &run(&up));
    for role in ["client", "relay", "server"] {
        Namespace::remove(&format!("pc-{name}-{role}")).unwrap();
    }
    eventually("the relay ends", || (relays(name) == 0).then_some(()));
    assert!(!Path::new(&format!("/run/policy-chain/{name}.delays")).exists());
}

#[test]
fn options_that_do_not_go_together() {
    for (arguments, parts) in [
        (
            &["--mptcp=signal", "--paths=6"][..],
            &["--paths", "1 to 5 with MPTCP"][..],
        ),
        (&["--mptcp=singal"], &["did you mean \"signal\"?"]),
        (
            &["--delay=1,2", "--paths=3"],
            &["--delay", "2 values", "3 paths"],
        ),
        (&["--delay=1", "--router"], &["--router"]),
        (&["--delay=-1"], &["milliseconds"]),
        (&["--delay=3000"], &["3000 ms", "0 to 2000 ms"]),
        (&["--rate=0"], &["--rate", "Mbit/s"]),
    ] {
        let command = [&["testbed", "up", "never"], arguments].concat();
        says(&failed("up", 2, &run(&command)), parts);
    }
    let environment = Environment::direct();
    let name = environment.testbed.name();
    let none = run(&["testbed", "set", name, "--path=1", "--delay=1"]);
    says(&failed("set", 1, &none), &["no relay", "--delay"]);
}

/// Wrong bytes are an excuse for two more attempts, a connection that stalls for none.
#[test]
fn only_wrong_bytes_are_tried_again() {
    let options = mptcp_options(2, Announce::Subflow);
    let done = Control::of(&options, 2, Duration::from_secs(30));
    assert_eq!(done.connections, 2);
    let control = || Control { ..done };
    let attempts = |right: u32, differs: fn(String) -> Differs| {
        let count = Cell::new(0);
        let attempt = || {
            count.set(count.get() + 1);
            match count.get() == right {
                true => Ok(()),
                false => Err(differs("made up, by the test of this".to_owned())),
            }
        };
        let passed = catch_unwind(AssertUnwindSafe(|| exact_beside(control, attempt)));
        (count.get(), passed.is_ok())
    };
    assert_eq!(attempts(1, Differs::Bytes), (1, true));
    assert_eq!(attempts(3, Differs::Bytes), (3, true));
    assert_eq!(attempts(4, Differs::Bytes), (3, false));
    assert_eq!(attempts(2, Differs::Stalled), (1, false));
}

/// How often the kernel by itself errs: for who wonders whether a retried connection was its fault.
#[test]
#[ignore = "takes minutes; says how often MPTCP errs without any BPF program"]
fn connections_without_bpf() {
    let options = mptcp_options(2, Announce::Signal);
    let control = Control::of(&options, 1000, Duration::from_secs(600));
    say(format_args!("{control}"));
}
