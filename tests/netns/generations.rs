// SPDX-License-Identifier: MIT OR Apache-2.0
//! Replacing what runs, under traffic: nothing is lost, nothing is left over, and whatever fails
//! or is killed leaves chains running.

use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use policy_chain::engine::sys;
use policy_chain::netns::Namespace;
use policy_chain::testbed::Role;
use serde_json::{Value, json};

use crate::common::kernel::Objects;
use crate::common::traffic::{Connection, Flow, Noise, PORT, server_addresses};
use crate::common::{BpfFolder, DEADLINE, Environment, PROGRAM, eventually, says, succeeded};

const APPLIES: u64 = 50;
const KILLS: u64 = 20;

/// A chain on a device of the server; another number, another window.
fn chain(name: &str, number: u64, devices: &[&str], hook: &str, mode: &str) -> Value {
    let attach: Vec<Value> = devices
        .iter()
        .map(|device| json!({ "device": device, "hook": hook, "mode": mode }))
        .collect();
    json!({
        "version": 1,
        "sets": { "ports": { "kind": "port", "size": 10 } },
        "chains": [{
            "name": name,
            "attach": attach,
            "selectors": [
                { "selector": "service", "local_port": PORT },
                { "selector": "service", "op": "or", "set": "ports" },
            ],
            "actions": [
                { "action": "count" },
                { "action": "set_window", "raw": true, "bytes": 1000 + number },
            ],
        }],
    })
}

fn open(environment: &Environment) -> Connection {
    Connection::open(environment, server_addresses(environment)[0], PORT)
}

/// Waits until none of these lives.
fn expect_gone(objects: &Objects) {
    let limit = Instant::now() + DEADLINE;
    loop {
        let left = objects.alive();
        if left.is_empty() {
            return;
        }
        assert!(Instant::now() < limit, "still there: {left:?}");
        thread::sleep(Duration::from_millis(5));
    }
}

/// That nothing of ours is at the device, and the folder is gone.
fn expect_clean(environment: &Environment, role: Role, device: &str) {
    assert!(!environment.folder().exists(), "the folder stays");
    expect_detached(environment.namespace(role), device);
}

fn expect_detached(namespace: &Namespace, device: &str) {
    let xdp = namespace
        .enter(|| sys::xdp_attached(sys::device_index(device).unwrap()).unwrap())
        .unwrap();
    assert_eq!(xdp, None);
    let qdiscs = namespace
        .command("tc")
        .args(["qdisc", "show", "dev", device])
        .output()
        .unwrap();
    let qdiscs = String::from_utf8(qdiscs.stdout).unwrap();
    assert!(!qdiscs.contains("clsact"), "{qdiscs}");
}

/// Applies a changed chain again and again under a transfer.
fn apply_repeatedly(hook: &str, mode: &str) {
    let environment = Environment::direct();
    let changed = |number| chain("t", number, &["path1"], hook, mode);
    environment.apply(Role::Server, &changed(0));
    let flow = Flow::start(open(&environment));
    let mut ever = Objects::default();
    let mut before = 0;
    for number in 1..=APPLIES {
        ever.extend(&Objects::below(environment.folder()));
        environment.apply(Role::Server, &changed(number));
        let counted = environment.packets(Role::Server, "t");
        assert!(counted >= before, "{counted} after {before}");
        before = counted;
    }
    flow.expect_progress();
    let counted = environment.packets(Role::Server, "t");
    assert!(counted > before);
    let listed = environment.listed(Role::Server, "t");
    assert_eq!(listed["attach"][0]["generation"], APPLIES + 1);
    assert_eq!(listed["actions"][1]["bytes"], 1000 + APPLIES);
    let generations = environment.generations();
    assert_eq!(generations.len(), 1, "{generations:?}");

    // Of all that ever was, only what runs now is left.
    let now = Objects::below(environment.folder());
    ever.extend(&now);
    eventually("earlier generations are released", || {
        (ever.alive() == now).then_some(())
    });
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_gone(&ever);
    flow.expect_progress();
    assert!(flow.finish() > 0);
}

#[test]
fn fifty_applies_by_xdp() {
    apply_repeatedly("xdp", "native");
}

#[test]
fn fifty_applies_by_tcx() {
    apply_repeatedly("tc-ingress", "tcx");
}

#[test]
fn fifty_applies_by_clsact() {
    apply_repeatedly("tc-egress", "clsact");
}

/// What has not changed keeps running as it is.
#[test]
fn an_apply_without_change_replaces_nothing() {
    let environment = Environment::direct();
    let file = chain("t", 0, &["path1"], "xdp", "auto");
    environment.apply(Role::Server, &file);
    let before = Objects::below(environment.folder());
    environment.apply(Role::Server, &file);
    assert_eq!(environment.generations().len(), 1);
    assert_eq!(
        Objects::below(environment.folder()).programs,
        before.programs
    );
    let listed = environment.listed(Role::Server, "t");
    assert_eq!(listed["attach"][0]["generation"], 1);
}

/// Another mode needs another link; the chain and its counters go along.
#[test]
fn modes_change() {
    let environment = Environment::direct();
    let mut ever = Objects::default();
    let mut connection = open(&environment);
    let mut before = 0;
    for mode in ["native", "generic", "native"] {
        let file = chain("t", 0, &["path1"], "xdp", mode);
        environment.apply(Role::Server, &file);
        ever.extend(&Objects::below(environment.folder()));
        connection.exchange(10);
        let listed = environment.listed(Role::Server, "t");
        assert_eq!(listed["attach"][0]["mode"], mode);
        let counted = listed["packets"].as_u64().unwrap();
        assert!(counted >= before + 10, "{counted} after {before}");
        before = counted;
    }
    connection.transfer(100_000);
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_gone(&ever);
}

/// Starts a command on the server, and kills it somewhere in the time it usually takes.
fn kill_sometime(
    environment: &Environment,
    arguments: &[&str],
    usual: Duration,
    noise: &mut Noise,
) {
    let mut child = environment
        .command(Role::Server, arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    // Not a wait for something: the moment of the blow.
    thread::sleep(usual.mul_f64((noise.next_number() % 1000) as f64 / 900.0));
    child.kill().unwrap();
    child.wait().unwrap();
}

/// Kills `apply` at any point of its work.
fn kill_apply(hook: &str, mode: &str) {
    let environment = Environment::direct();
    let changed = |number| chain("t", number, &["path1"], hook, mode);
    environment.apply(Role::Server, &changed(0));
    let started = Instant::now();
    environment.apply(Role::Server, &changed(1));
    let usual = started.elapsed();
    let flow = Flow::start(open(&environment));
    let mut ever = Objects::default();
    let mut noise = Noise::new(usual.as_nanos() as u64);
    for number in 2..2 + KILLS {
        ever.extend(&Objects::below(environment.folder()));
        let file = environment.file("killed.json", &changed(number));
        kill_sometime(&environment, &["apply", &file], usual, &mut noise);
        let listed = environment.listed(Role::Server, "t");
        let window = listed["actions"][1]["bytes"].as_u64().unwrap();
        assert!((1000..=1000 + number).contains(&window), "{listed}");
        flow.expect_progress();
    }
    ever.extend(&Objects::below(environment.folder()));
    environment.apply(Role::Server, &changed(100));
    let listed = environment.listed(Role::Server, "t");
    assert_eq!(listed["actions"][1]["bytes"], 1100);
    let before = listed["packets"].as_u64().unwrap();
    flow.expect_progress();
    eventually("the new chain counts", || {
        (environment.packets(Role::Server, "t") > before).then_some(())
    });
    assert_eq!(environment.generations().len(), 1);
    ever.extend(&Objects::below(environment.folder()));
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_gone(&ever);
    flow.finish();
}

#[test]
fn killed_applies_by_xdp() {
    kill_apply("xdp", "native");
}

#[test]
fn killed_applies_by_tcx() {
    kill_apply("tc-ingress", "tcx");
}

#[test]
fn killed_applies_by_clsact() {
    kill_apply("tc-ingress", "clsact");
}

/// Kills `apply` while it changes the mode, when for a moment nothing is attached.
#[test]
fn killed_changes_of_mode() {
    let environment = Environment::direct();
    let changed = |mode| chain("t", 0, &["path1"], "xdp", mode);
    environment.apply(Role::Server, &changed("native"));
    let started = Instant::now();
    environment.apply(Role::Server, &changed("generic"));
    let usual = started.elapsed();
    let mut ever = Objects::default();
    let mut noise = Noise::new(usual.as_nanos() as u64);
    for mode in ["native", "generic"].repeat(10) {
        ever.extend(&Objects::below(environment.folder()));
        let file = environment.file("killed.json", &changed(mode));
        kill_sometime(&environment, &["apply", &file], usual, &mut noise);
        ever.extend(&Objects::below(environment.folder()));
        environment.ok(Role::Server, &["list"]);
        open(&environment).exchange(2);
    }
    environment.apply(Role::Server, &changed("native"));
    let listed = environment.listed(Role::Server, "t");
    assert_eq!(listed["attach"][0]["mode"], "native");
    assert_eq!(environment.generations().len(), 1);
    ever.extend(&Objects::below(environment.folder()));
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_gone(&ever);
}

/// Writers wait for one another.
#[test]
fn applies_at_the_same_time() {
    let environment = Environment::direct();
    let children: Vec<_> = (0..6)
        .map(|number| {
            let name = ["a", "b"][number as usize % 2];
            let file = chain(name, number, &["path1"], "tc-ingress", "auto");
            let file = environment.file(&format!("{number}.json"), &file);
            let mut command = environment.command(Role::Server, &["apply", &file]);
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        })
        .collect();
    for child in children {
        succeeded("apply", &child.wait_with_output().unwrap());
    }
    for name in ["a", "b"] {
        assert_eq!(environment.listed(Role::Server, name)["name"], name);
    }
    assert_eq!(environment.generations().len(), 1);
    open(&environment).exchange(2);
    let ever = Objects::below(environment.folder());
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_gone(&ever);
}

/// Kills the very first `apply`, and `delete`: what is left is nothing, or all of it.
#[test]
fn killed_first_applies_and_deletes() {
    let environment = Environment::direct();
    let file = environment.file("t.json", &chain("t", 0, &["path1"], "xdp", "native"));
    let started = Instant::now();
    environment.ok(Role::Server, &["apply", &file]);
    let usual = started.elapsed();
    let mut ever = Objects::below(environment.folder());
    environment.ok(Role::Server, &["delete", "--all"]);
    let mut noise = Noise::new(usual.as_nanos() as u64);
    for arguments in [["apply", &file], ["delete", "--all"]].repeat(10) {
        kill_sometime(&environment, &arguments, usual, &mut noise);
        ever.extend(&Objects::below(environment.folder()));
        environment.ok(Role::Server, &["list"]);
        open(&environment).exchange(2);
    }
    environment.ok(Role::Server, &["apply", &file]);
    ever.extend(&Objects::below(environment.folder()));
    assert_eq!(environment.listed(Role::Server, "t")["name"], "t");
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_gone(&ever);
}

/// Runs a command that must fail, under a transfer; what ran before runs on, and nothing is new.
fn fails_without_trace(environment: &Environment, arguments: &[&str], code: i32, words: &[&str]) {
    let state = || {
        let list = environment.json(Role::Server, &["list", "--json"]);
        let mut chains = list.as_array().unwrap().clone();
        for chain in &mut chains {
            for counted in ["packets", "bytes"] {
                chain.as_object_mut().unwrap().remove(counted);
                for place in chain["attach"].as_array_mut().unwrap() {
                    place.as_object_mut().unwrap().remove(counted);
                }
            }
        }
        let sets = environment.json(Role::Server, &["set", "list", "--json"]);
        (chains, sets, environment.generations())
    };
    let programs = || {
        let objects = Objects::below(environment.folder());
        (objects.programs, objects.links)
    };
    let (state_before, programs_before) = (state(), programs());
    let packets = environment.packets(Role::Server, "t");
    let message = environment.fails(Role::Server, code, arguments);
    says(&message, words);
    assert_eq!(state(), state_before, "after {arguments:?}");
    assert_eq!(programs(), programs_before, "after {arguments:?}");
    eventually("the chain still counts", || {
        (environment.packets(Role::Server, "t") > packets).then_some(())
    });
}

#[test]
fn failures_change_nothing() {
    let environment = Environment::direct_paths(2);
    let good = chain("t", 0, &["path1"], "xdp", "native");
    environment.apply(Role::Server, &good);
    let flow = Flow::start(open(&environment));
    let fails = |content: &str, code, words: &[&str]| {
        let path = environment.files.write("bad.json", content);
        let path = path.to_str().unwrap();
        fails_without_trace(&environment, &["apply", path], code, words);
    };
    let changed = |change: &dyn Fn(&mut Value)| {
        let mut file = chain("t", 1, &["path1"], "xdp", "native");
        change(&mut file);
        file.to_string()
    };
    fails("{ \"version\": 1, ", 2, &["bad.json", "valid JSON"]);
    fails(
        &changed(&|file| file["chains"][0]["actions"][1]["bytes"] = 70_000.into()),
        2,
        &["$.chains[0].actions[1].bytes", "70000", "65535"],
    );
    fails(
        &changed(&|file| file["chains"][0]["actions"][0]["action"] = "cont".into()),
        2,
        &["$.chains[0].actions[0].action", "count"],
    );
    fails(
        &changed(&|file| file["sets"]["ports"]["size"] = 20.into()),
        2,
        &["ports", "size 20", "size 10"],
    );
    fails(
        &changed(&|file| file["chains"][0]["attach"][0]["device"] = "path9".into()),
        1,
        &["bad.json", "$.chains[0].attach[0]", "path9"],
    );
    fails(
        &changed(&|file| {
            file["chains"][0]["actions"] = json!([{ "action": "redirect", "device": "path9" }]);
        }),
        2,
        &["bad.json", "$.chains[0].actions[0].device", "path9"],
    );
    flow.finish();
}

/// The second device is somebody else's, which only shows when the first has been switched.
#[test]
fn a_taken_device_changes_nothing() {
    let environment = Environment::direct_paths(2);
    let other = BpfFolder::new();
    let foreign = chain("foreign", 0, &["path2"], "xdp", "native");
    let foreign = environment.file("foreign.json", &foreign);
    let apply_other = environment
        .namespace(Role::Server)
        .command(PROGRAM)
        .arg("--bpffs")
        .arg(other.path())
        .args(["apply", &foreign])
        .output()
        .unwrap();
    succeeded("the foreign chain", &apply_other);
    environment.apply(Role::Server, &chain("t", 0, &["path1"], "xdp", "native"));
    let flow = Flow::start(open(&environment));
    let mut both = chain("t", 1, &["path1", "path2"], "xdp", "native");
    both["sets"]["more"] = json!({ "kind": "flow", "size": 5 });
    let both = environment.file("both.json", &both);
    fails_without_trace(
        &environment,
        &["apply", &both],
        1,
        &["path2 runs another XDP program", "pc_entry", "native"],
    );
    // And the same where nothing ran before.
    environment.ok(Role::Server, &["delete", "--all"]);
    environment.fails(Role::Server, 1, &["apply", &both]);
    expect_clean(&environment, Role::Server, "path1");
    flow.expect_progress();
    flow.finish();
    let folder = other.path().to_owned();
    let delete_other = environment
        .namespace(Role::Server)
        .command(PROGRAM)
        .arg("--bpffs")
        .arg(folder)
        .args(["delete", "--all"])
        .output()
        .unwrap();
    succeeded("delete the foreign chain", &delete_other);
    environment.ok(Role::Server, &["apply", &both]);
    assert_eq!(environment.generations().len(), 2);
}

/// The device goes while chains are attached, and another of the same name and index comes.
fn device_goes(hook: &str, mode: &str) {
    let environment = Environment::direct();
    let namespace = environment.namespace(Role::Server);
    let make = "link add d0 index 77 type veth peer name d1\nlink set d0 up\nlink set d1 up\n";
    namespace.ip_batch(make).unwrap();
    let on_device = |number| chain("t", number, &["d0"], hook, mode);
    environment.apply(Role::Server, &on_device(0));
    environment.apply(Role::Server, &chain("stays", 0, &["path1"], hook, mode));
    let mut ever = Objects::below(environment.folder());
    namespace.ip_batch("link del d0\n").unwrap();
    let expect_absent = || {
        let listed = environment.listed(Role::Server, "t");
        assert_eq!(listed["attach"], json!([]));
        let absent = json!([{ "device": "d0", "hook": hook }]);
        assert_eq!(listed["absent"], absent);
        let stays = environment.listed(Role::Server, "stays");
        assert_eq!(
            (&stays["absent"], &stays["attach"][0]["device"]),
            (&json!([]), &json!("path1"))
        );
    };
    expect_absent();
    let table = environment.ok(Role::Server, &["list"]);
    says(&table, &[&format!("d0 {hook} (absent)")]);
    says(
        &environment.ok(Role::Server, &["show", "t"]),
        &[&format!("absent: d0 {hook}")],
    );
    let file = environment.file("t.json", &on_device(1));
    let message = environment.fails(Role::Server, 1, &["apply", &file]);
    says(
        &message,
        &["t.json", "$.chains[0].attach[0]", "no device d0"],
    );
    namespace.ip_batch(make).unwrap();
    expect_absent();
    environment.ok(Role::Server, &["apply", &file]);
    let listed = environment.listed(Role::Server, "t");
    assert_eq!(listed["attach"][0]["generation"], 1);
    assert_eq!(listed["absent"], json!([]));
    assert_eq!(environment.generations().len(), 2);
    ever.extend(&Objects::below(environment.folder()));
    // Whatever is applied next brings back what the device's successor lacks.
    namespace.ip_batch("link del d0\n").unwrap();
    namespace.ip_batch(make).unwrap();
    expect_absent();
    environment.apply(Role::Server, &chain("stays", 1, &["path1"], hook, mode));
    let listed = environment.listed(Role::Server, "t");
    assert_eq!(listed["attach"][0]["device"], "d0");
    assert_eq!(listed["actions"][1]["bytes"], 1001);
    ever.extend(&Objects::below(environment.folder()));
    // Again, and this time nothing but the clean-up follows.
    namespace.ip_batch("link del d0\n").unwrap();
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_gone(&ever);
}

#[test]
fn device_goes_under_xdp() {
    device_goes("xdp", "native");
}

#[test]
fn device_goes_under_tcx() {
    device_goes("tc-egress", "tcx");
}

#[test]
fn device_goes_under_clsact() {
    device_goes("tc-ingress", "clsact");
}

/// A namespace goes while chains are attached in it.
#[test]
fn namespace_goes() {
    let environment = Environment::direct();
    let name = format!("{}-gone", environment.testbed.name());
    let namespace = Namespace::create(&name).unwrap();
    namespace
        .ip_batch("link add d0 type veth peer name d1\n")
        .unwrap();
    let file = environment.file("t.json", &chain("t", 0, &["d0"], "xdp", "native"));
    let apply = namespace
        .command(PROGRAM)
        .arg("--bpffs")
        .arg(environment.folder())
        .args(["apply", &file])
        .output()
        .unwrap();
    succeeded("apply", &apply);
    environment.apply(
        Role::Server,
        &chain("stays", 0, &["path1"], "xdp", "native"),
    );
    let mut ever = Objects::below(environment.folder());
    let names = |arguments: &[&str]| -> Vec<String> {
        let list = environment.json(Role::Server, arguments);
        let items = list.as_array().unwrap().iter();
        items
            .map(|c| c["name"].as_str().unwrap().to_owned())
            .collect()
    };
    assert_eq!(names(&["list", "--json"]), ["stays"]);
    assert_eq!(names(&["list", "--all-netns", "--json"]), ["stays", "t"]);
    namespace.delete().unwrap();
    eventually("the namespace is gone", || {
        (names(&["list", "--all-netns", "--json"]) == ["stays"]).then_some(())
    });
    // The next writer removes what is left of it.
    environment.apply(
        Role::Server,
        &chain("stays", 1, &["path1"], "xdp", "native"),
    );
    assert_eq!(environment.generations().len(), 1);
    ever.extend(&Objects::below(environment.folder()));
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_gone(&ever);
}

/// `delete --all` is about its own namespace, until it is told otherwise.
#[test]
fn delete_all_stays_in_its_namespace() {
    let environment = Environment::direct();
    for role in [Role::Client, Role::Server] {
        let name = format!("on-{role}");
        environment.apply(role, &chain(&name, 0, &["path1"], "xdp", "native"));
    }
    let ever = Objects::below(environment.folder());
    assert_eq!(environment.generations().len(), 2);
    environment.ok(Role::Server, &["delete", "--all"]);
    expect_detached(environment.namespace(Role::Server), "path1");
    assert_eq!(environment.generations().len(), 1);
    environment.ok(Role::Server, &["delete", "--all", "--all-netns"]);
    expect_clean(&environment, Role::Server, "path1");
    expect_detached(environment.namespace(Role::Client), "path1");
    expect_gone(&ever);
}

/// A filter can be removed from inside its namespace only: what it uses stays.
#[test]
fn delete_all_leaves_filters_elsewhere() {
    let environment = Environment::direct();
    environment.apply(
        Role::Client,
        &chain("far", 0, &["path1"], "tc-ingress", "clsact"),
    );
    environment.apply(Role::Server, &chain("near", 0, &["path1"], "xdp", "native"));
    let ever = Objects::below(environment.folder());
    let message = environment.fails(Role::Server, 1, &["delete", "--all", "--all-netns"]);
    says(&message, &["another network namespace", "delete --all"]);
    expect_detached(environment.namespace(Role::Server), "path1");
    environment.apply(
        Role::Client,
        &chain("far", 1, &["path1"], "tc-ingress", "clsact"),
    );
    environment.ok(Role::Client, &["delete", "--all"]);
    expect_clean(&environment, Role::Client, "path1");
    expect_gone(&ever);
}

/// Sub-chains and sets are one for all namespaces of a folder: none takes them from another.
#[test]
fn what_another_namespace_uses_stays() {
    let environment = Environment::direct();
    let file = |window: u32| {
        json!({
            "version": 1,
            "sets": { "ports": { "kind": "port", "size": 5 } },
            "chains": [
                { "name": "far", "attach": [{ "device": "path1", "hook": "xdp" }],
                  "selectors": [{ "selector": "service", "set": "ports" }],
                  "then": { "goto": "shared" } },
                { "name": "shared",
                  "actions": [{ "action": "set_window", "raw": true, "bytes": window }] },
            ],
        })
    };
    environment.apply(Role::Client, &file(1));
    let used = "the chain shared is in use";
    let changed = environment.file(
        "changed.json",
        &json!({
            "version": 1,
            "chains": [{ "name": "shared", "actions": [{ "action": "count" }] }],
        }),
    );
    let message = environment.fails(Role::Server, 1, &["apply", &changed]);
    says(&message, &[used, "path1 xdp of network namespace"]);
    let message = environment.fails(Role::Server, 1, &["delete", "shared"]);
    says(&message, &[used]);
    let nothing = environment.file("nothing.json", &json!({ "version": 1, "chains": [] }));
    environment.fails(Role::Server, 1, &["apply", "--prune", &nothing]);
    let message = environment.fails(Role::Server, 1, &["set", "delete", "ports"]);
    says(&message, &["in use"]);
    environment.ok(Role::Client, &["apply", &changed]);
    environment.ok(Role::Client, &["delete", "--all"]);
    expect_clean(&environment, Role::Client, "path1");
}
