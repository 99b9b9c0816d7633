// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line: what every error says and which code it ends in, and the shape of what the
//! reading commands print. Needs root.

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod common;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Output};

use policy_chain::testbed::Role;
use serde_json::{Value, json};

use common::traffic::{Connection, PORT, server_addresses};
use common::{BpfFolder, Environment, Files, PROGRAM, failed, says, succeeded, text};

/// `nobody`
const NOBODY: u32 = 65534;

fn run(arguments: &[&str]) -> Output {
    Command::new(PROGRAM).args(arguments).output().unwrap()
}

/// A chain file with one chain, attached by XDP to `path1`.
fn one_chain(selectors: Value, actions: Value) -> Value {
    json!({
        "version": 1,
        "chains": [{
            "name": "t",
            "attach": [{ "device": "path1", "hook": "xdp" }],
            "selectors": selectors,
            "actions": actions,
        }],
    })
}

/// What `check` says about a bad file: one screen, with file and place, exit code 2.
#[track_caller]
fn refused(content: impl AsRef<[u8]>, words: &[&str]) {
    let files = Files::new();
    let file = files.write("bad.json", content);
    let output = run(&["check", file.to_str().unwrap()]);
    let message = failed("check", 2, &output);
    assert!(
        message.starts_with(&format!("error: {}: ", file.display())),
        "{message}"
    );
    says(&message, &["\n  found:    ", "\n  expected: "]);
    says(&message, words);
}

#[test]
fn wrong_json() {
    refused("", &["an empty file", "do:       start from"]);
    refused(
        "{ \"version\": 1,\n  \"chains\": [}",
        &["line 2, column 14", "valid JSON"],
    );
    refused(
        "{ \"version\": 1, \"chains\": [",
        &["line 1, ", "ends too early"],
    );
    refused("[]", &[": $", "an object"]);
    refused(
        b"{ \"version\": 1, \"\xff\" }",
        &["line 1, column", "UTF-8"],
    );
    refused("{}", &["$.version", "nothing", "add \"version\""]);
    refused("{ \"version\": 2 }", &["$.version", "found:    2", "1"]);
}

#[test]
fn duplicate_keys() {
    refused(
        r#"{ "version": 1, "chains": [ { "name": "a", "name": "b" } ] }"#,
        &["line 1, column", "\"name\" twice", "remove or rename"],
    );
}

#[test]
fn unknown_keys_and_policies() {
    refused(
        r#"{ "version": 1, "chain": [] }"#,
        &[
            "$.chain",
            "\"chain\"",
            "did you mean \"chains\"?",
            "\"version\"",
        ],
    );
    let with = |change: &dyn Fn(&mut Value)| {
        let mut file = one_chain(
            json!([{ "selector": "tcp" }]),
            json!([{ "action": "count" }]),
        );
        change(&mut file["chains"][0]);
        file.to_string()
    };
    refused(
        with(&|chain| chain["selector"] = json!([])),
        &["$.chains[0].selector", "did you mean \"selectors\"?"],
    );
    refused(
        with(&|chain| chain["selectors"][0]["selector"] = "tpc".into()),
        &[
            "$.chains[0].selectors[0].selector",
            "\"tpc\" (did you mean \"tcp\"?)",
            "policies",
        ],
    );
    refused(
        with(&|chain| chain["actions"][0]["action"] = "set_windwo".into()),
        &[
            "$.chains[0].actions[0].action",
            "did you mean \"set_window\"?",
        ],
    );
    refused(
        with(&|chain| chain["actions"][0]["action"] = "tcp".into()),
        &[
            "$.chains[0].actions[0].action",
            "which is a selector",
            "\"selectors\"",
        ],
    );
    refused(
        with(&|chain| chain["actions"][0] = json!({ "action": "set_mss", "byte": 1 })),
        &["$.chains[0].actions[0].byte", "did you mean \"bytes\"?"],
    );
    refused(
        with(&|chain| chain["attach"][0]["hook"] = "tc_ingress".into()),
        &[
            "$.chains[0].attach[0].hook",
            "did you mean \"tc-ingress\"?",
            "\"tc-egress\"",
        ],
    );
    refused(
        with(&|chain| chain["attach"][0]["mode"] = "tcx".into()),
        &[
            "$.chains[0].attach[0].mode",
            "\"tcx\"",
            "\"native\"",
            "\"generic\"",
        ],
    );
    refused(
        with(&|chain| chain["then"] = json!({ "goto": "nowhere" })),
        &["$.chains[0].then.goto", "\"nowhere\", no such chain"],
    );
    refused(
        with(&|chain| chain["selectors"][0] = json!({ "selector": "flow", "set": "nix" })),
        &[
            "$.chains[0].selectors[0].set",
            "\"nix\", no such set",
            "define it",
            "\"kind\": \"flow\"",
        ],
    );
}

#[test]
fn how_often_actions_are_done() {
    let counted = |how: Value| {
        let mut action = json!({ "action": "count" });
        let members = action.as_object_mut().unwrap();
        members.extend(how.as_object().unwrap().clone());
        one_chain(json!([]), json!([action])).to_string()
    };
    for (how, words) in [
        (
            json!({ "once": 1 }),
            &["actions[0].once", "true or false"][..],
        ),
        (
            json!({ "first": 0 }),
            &["actions[0].first", "found:    0", "from 1 to 4294967295"],
        ),
        (json!({ "first": 1.5 }), &["actions[0].first", "1.5"]),
        (
            json!({ "every": "0s" }),
            &["actions[0].every", "\"0s\"", "above 0"],
        ),
        (
            json!({ "every": "soon" }),
            &["actions[0].every", "\"soon\"", "\"5s\""],
        ),
        (json!({ "every": 5 }), &["actions[0].every", "found:    5"]),
        (
            json!({ "once": true, "first": 3 }),
            &[
                "actions[0].first",
                "both \"once\" and \"first\"",
                "one of",
                "do: ",
            ],
        ),
        (
            json!({ "first": 3, "every": "5s" }),
            &["actions[0].every", "both \"first\" and \"every\""],
        ),
        (
            json!({ "onse": true }),
            &["actions[0].onse", "\"once\", \"every\" or \"first\""],
        ),
    ] {
        refused(counted(how), words);
    }
    let files = Files::new();
    for how in [
        json!({ "once": true }),
        json!({ "once": false }),
        json!({ "first": 4294967295u32 }),
        json!({ "every": "1ns" }),
    ] {
        let file = files.write("good.json", counted(how));
        succeeded("check", &run(&["check", file.to_str().unwrap()]));
    }
}

#[test]
fn tokens_of_connections() {
    let keyed = |keys: Value| {
        let selector = json!({ "selector": "mptcp_connection", "keys": keys });
        one_chain(json!([selector]), json!([])).to_string()
    };
    for wrong in [
        json!("xyz"),
        json!("123456789"),
        json!(""),
        json!("0"),
        json!(5),
        json!("-1"),
    ] {
        let words = ["keys[0].token", "1 to 8 hex digits", "ss -tniM"];
        refused(keyed(json!([{ "token": wrong }])), &words);
    }
    refused(
        keyed(json!([{ "token": "1a" }, { "token": "0000001A" }])),
        &["keys[1]", "each key once"],
    );
    refused(
        keyed(json!([{ "tokn": "1" }])),
        &["keys[0].tokn", "did you mean \"token\"?"],
    );
    let bare = one_chain(json!([{ "selector": "mptcp_connection" }]), json!([]));
    refused(
        bare.to_string(),
        &["selectors[0]", "without keys", "of kind connection"],
    );
    let files = Files::new();
    let file = files.write(
        "good.json",
        keyed(json!([{ "token": "5F2A01c7" }, { "token": "1" }])),
    );
    succeeded("check", &run(&["check", file.to_str().unwrap()]));
}

#[test]
fn watching_commands() {
    for (command, words) in [
        (
            "connections",
            &["--all", "--over <TIME>", "500ms", "--json", "\"record\""][..],
        ),
        (
            "events",
            &[
                "--count <N>",
                "--timeout <TIME>",
                "--wait",
                "--json",
                "`report`",
            ],
        ),
        ("agent", &["until interrupted", "--bpffs <DIR>"]),
    ] {
        let help = succeeded(command, &run(&[command, "--help"]));
        says(&help, words);
        assert!(
            help.lines().all(|line| line.chars().count() <= 100),
            "{help}"
        );
    }
    for (arguments, words) in [
        (
            &["connections", "--over", "fast"][..],
            &["'fast'", "'--over <TIME>'"][..],
        ),
        (&["connections", "here"], &["'here'"]),
        (&["events", "--count", "0"], &["'0'", "'--count <N>'"]),
        (&["events", "--count", "-1"], &["'-1'"]),
        (
            &["events", "--timeout", "5"],
            &["'5'", "'--timeout <TIME>'", "ms"],
        ),
        (&["agent", "path1"], &["'path1'"]),
    ] {
        says(&failed("usage", 2, &run(arguments)), words);
    }
    // No chain is no error, but where one has to be.
    let environment = Environment::direct();
    let nothing = environment.json(Role::Client, &["connections", "--json", "--over", "1ms"]);
    assert_eq!(nothing, json!([]));
    let nothing = environment.ok(Role::Client, &["connections", "--over", "1ms"]);
    assert_eq!(nothing, "no connections are known here\n");
    let message = environment.fails(Role::Client, 1, &["events"]);
    says(
        &message,
        &["there are no events", "why: ", "do: ", "--wait"],
    );
    assert!(!environment.folder().exists());
}

#[test]
fn values_out_of_range() {
    let action = |action: Value| one_chain(json!([]), json!([action])).to_string();
    let selector = |selector: Value| one_chain(json!([selector]), json!([])).to_string();
    refused(
        action(json!({ "action": "set_mss", "bytes": 0 })),
        &[
            "$.chains[0].actions[0].bytes",
            "the number 0",
            "from 1 to 65535",
        ],
    );
    refused(
        action(json!({ "action": "set_window", "raw": true, "bytes": 65536 })),
        &[
            "$.chains[0].actions[0].bytes",
            "65536",
            "from 0 to 65535",
            "with \"raw\": true",
        ],
    );
    refused(
        action(json!({ "action": "set_window", "bytes": (65535 << 14) + 1 })),
        &[
            "$.chains[0].actions[0].bytes",
            "1073725441",
            "to 1073725440",
        ],
    );
    refused(
        action(json!({ "action": "set_window", "raw": true })),
        &["$.chains[0].actions[0].bytes", "nothing"],
    );
    for kind in ["nop", "eol"] {
        refused(
            action(json!({ "action": "insert_option", "kind": kind })),
            &["$.chains[0].actions[0].kind", kind, "from 2 to 255"],
        );
    }
    refused(
        action(json!({ "action": "insert_option", "kind": 253, "data": "00".repeat(39) })),
        &["$.chains[0].actions[0].data", "at most 38 bytes"],
    );
    refused(
        selector(json!({ "selector": "prefix", "src": "10.0.0.1/8" })),
        &["$.chains[0].selectors[0].src", "host bits", "10.0.0.0/8"],
    );
    refused(
        selector(json!({ "selector": "service", "port": "9-3" })),
        &["$.chains[0].selectors[0].port", "\"9-3\"", "LO-HI"],
    );
    refused(
        selector(json!({ "selector": "service", "port": "htpps" })),
        &["$.chains[0].selectors[0].port", "\"htpps\"", "service"],
    );
    refused(
        selector(json!({ "selector": "ip_pair", "src": "10.0.0.256" })),
        &["$.chains[0].selectors[0].src", "10.0.0.256", "address"],
    );
    refused(
        r#"{ "version": 1, "sets": { "s": { "kind": "flow", "size": 0 } } }"#,
        &["$.sets.s.size", "0", "from 1 to 16777216"],
    );
    let mut far = one_chain(json!([]), json!([]));
    far["chains"][0]["priority"] = 40_000.into();
    refused(
        far.to_string(),
        &["$.chains[0].priority", "40000", "-32768 to 32767"],
    );
    refused(
        action(json!({ "action": "set_mss", "bytes": { "from": "element" } })),
        &["$.chains[0].actions[0].bytes", "element"],
    );
}

/// Several megabytes of brackets end in an error, not in a crash.
#[test]
fn what_a_hook_does_not_have() {
    let attached = |attach: Value, actions: Value| {
        let mut file = one_chain(json!([]), actions);
        file["chains"][0]["attach"] = json!([attach]);
        file.to_string()
    };
    let remove = json!([{ "action": "strip_option", "kind": "mptcp", "mode": "remove" }]);
    for hook in ["tc-ingress", "tc-egress"] {
        refused(
            attached(json!({ "device": "lo", "hook": hook }), remove.clone()),
            &[
                "$.chains[0].actions[0].mode",
                hook,
                "no right way to shrink a header",
                "\"remove\" on xdp only",
            ],
        );
        refused(
            attached(
                json!({ "device": "lo", "hook": hook, "checksum": "complete" }),
                json!([]),
            ),
            &[
                "$.chains[0].attach[0].checksum",
                "\"complete\"",
                "the kernel tells TC programs",
            ],
        );
    }
    let xdp = json!({ "device": "lo", "hook": "xdp", "checksum": "partial" });
    let file = attached(xdp, remove);
    let files = Files::new();
    let path = files.write("ok.json", &file);
    let checked = run(&["check", path.to_str().unwrap()]);
    assert!(checked.status.success(), "{checked:?}");
    let mut two: Value = serde_json::from_str(&file).unwrap();
    let mut second = two["chains"][0].clone();
    second["name"] = "second".into();
    second["attach"][0]["checksum"] = "complete".into();
    two["chains"].as_array_mut().unwrap().push(second);
    refused(
        two.to_string(),
        &[
            "$.chains[1].attach[0].checksum",
            "\"partial\" as in chain",
            "have one checksum",
        ],
    );
}

#[test]
fn nested_without_end() {
    const DEPTH: usize = 5 << 20;
    refused("[".repeat(DEPTH), &["nested too deep", "127 levels"]);
    refused(
        "{\"a\":".repeat(DEPTH / 5),
        &["nested too deep", "127 levels"],
    );
    let inside = format!("{{\"version\":1,\"chains\":{}", "[".repeat(DEPTH));
    refused(inside, &["nested too deep", "127 levels"]);
    let long = format!("{{\"version\":1,\"{}\":1}}", "x".repeat(DEPTH));
    refused(long, &["the unknown key"]);
    let value = format!("{{\"version\":\"{}\"}}", "x".repeat(DEPTH));
    refused(value, &["$.version"]);
    let many = vec![json!({ "selector": "tcp" }); 100_000];
    refused(
        one_chain(many.into(), json!([])).to_string(),
        &["100000 nodes", "33"],
    );
}

#[test]
fn too_many_tail_calls() {
    let mut selectors = vec![json!({ "selector": "tcp" }); 30];
    selectors[29] = json!({ "selector": "tcp_flags", "all": ["syn"] });
    let fits = vec![json!({ "action": "count" }); 3];
    let files = Files::new();
    let file = files.write(
        "fits.json",
        one_chain(selectors.clone().into(), fits.into()).to_string(),
    );
    succeeded("check", &run(&["check", file.to_str().unwrap()]));
    let surplus = vec![json!({ "action": "count" }); 4];
    refused(
        one_chain(selectors.into(), surplus.into()).to_string(),
        &[
            "$.chains[0].actions[3]",
            "a path of 34 nodes: t/0:tcp -> t/1:tcp -> ",
            "(18 more)",
            "t/29:tcp_flags -> ",
            " -> t/33:count\n",
            "at most 33 nodes",
            "do: ",
        ],
    );
    // The longest names there are still make a message of one screen.
    let name = |number: usize| format!("{}{number:05}", "n".repeat(27));
    let chain = |number: usize, last: usize| {
        let mut chain = json!({ "name": name(number) });
        if number == 0 {
            chain["attach"] = json!([{ "device": "path1", "hook": "xdp" }]);
        }
        if number < last {
            chain["then"] = json!({ "goto": name(number + 1) });
        }
        chain
    };
    for last in [33, 5000] {
        let chains: Vec<Value> = (0..=last).map(|number| chain(number, last)).collect();
        let file = json!({ "version": 1, "chains": chains }).to_string();
        refused(file, &[" more)", "at most 33 nodes"]);
    }
    let mut circle: Vec<Value> = (0..=20).map(|number| chain(number, 20)).collect();
    circle[20]["then"] = json!({ "goto": name(1) });
    let file = json!({ "version": 1, "chains": circle }).to_string();
    refused(file, &["chains that end", "circle"]);
}

#[test]
fn files_that_cannot_be_read() {
    let files = Files::new();
    let missing = files.path().join("missing.json");
    let message = failed("check", 2, &run(&["check", missing.to_str().unwrap()]));
    says(&message, &["missing.json", "no such file"]);
    let message = failed("check", 2, &run(&["check", files.path().to_str().unwrap()]));
    says(&message, &["a directory"]);
}

#[test]
fn wrong_usage() {
    for arguments in [
        &["aply", "x.json"][..],
        &["apply"],
        &["list", "--jsn"],
        &[
            "replay", "x.json", "--chain", "a", "--in", "x", "--hook", "xpd",
        ],
        &["delete", "--all", "x"],
        &["testbed", "up", "x", "--paths", "many"],
    ] {
        let output = run(arguments);
        assert_eq!(output.status.code(), Some(2), "{arguments:?}");
        assert!(text(&output.stderr).starts_with("error: "), "{arguments:?}");
    }
    let message = failed("policies", 2, &run(&["policies", "set_windo"]));
    says(
        &message,
        &["did you mean \"set_window\"?", "policy-chain policies"],
    );
    let message = failed("testbed", 2, &run(&["testbed", "up", "UP"]));
    says(&message, &["\"UP\"", "a-z"]);
    let message = failed("testbed", 2, &run(&["testbed", "up", "x", "--paths", "9"]));
    says(&message, &["--paths", "1 to 8"]);
}

/// A copy of the program that everybody may run, and a chain file that everybody may read.
fn for_everybody(files: &Files) -> (String, String) {
    let program = files.path().join("policy-chain");
    // By a process of its own: a test forking meanwhile would inherit our descriptor, and a file
    // that somebody writes to cannot be run.
    let copied = Command::new("cp").arg(PROGRAM).arg(&program).output();
    succeeded("cp", &copied.unwrap());
    let chains = one_chain(json!([]), json!([{ "action": "count" }]));
    let file = files.write("t.json", chains.to_string());
    for (path, mode) in [(files.path(), 0o755), (&program, 0o755), (&file, 0o644)] {
        fs::set_permissions(path, fs::Permissions::from_mode(mode)).unwrap();
    }
    let text = |path: &Path| path.to_str().unwrap().to_owned();
    (text(&program), text(&file))
}

/// After the namespace has been entered, which `Command::uid` would come before.
fn become_nobody() -> std::io::Result<()> {
    // SAFETY: plain integers, and an empty list.
    let done = unsafe {
        libc::setgroups(0, std::ptr::null()) == 0
            && libc::setgid(NOBODY) == 0
            && libc::setuid(NOBODY) == 0
    };
    match done {
        true => Ok(()),
        false => Err(std::io::Error::last_os_error()),
    }
}

/// The kernel calls itself 2.6 to a process that asks for that (personality(2)).
fn see_an_old_kernel() -> std::io::Result<()> {
    const UNAME26: libc::c_ulong = 0x0020000;
    // SAFETY: a plain integer.
    match unsafe { libc::personality(UNAME26) } {
        -1 => Err(std::io::Error::last_os_error()),
        _ => Ok(()),
    }
}

#[test]
fn a_kernel_too_old() {
    let environment = Environment::direct();
    let chain = |action: &str| one_chain(json!([]), json!([{ "action": action }]));
    environment.apply(Role::Server, &chain("count"));
    let file = environment.file("new.json", &chain("drop"));
    let mut command = environment.namespace(Role::Server).command(PROGRAM);
    // SAFETY: a system call only, between fork and exec.
    unsafe { command.pre_exec(see_an_old_kernel) };
    command.arg("--bpffs").arg(environment.folder());
    let output = command.args(["apply", &file]).output().unwrap();
    let message = failed("an old kernel", 3, &output);
    says(
        &message,
        &[
            "Linux 2.6",
            "too old",
            "xdp.frags",
            "5.18",
            "use a kernel from 6.1 on",
        ],
    );
    let listed = environment.ok(Role::Server, &["list", "--json"]);
    assert!(
        listed.contains("count") && !listed.contains("drop"),
        "{listed}"
    );
}

#[test]
fn without_privileges() {
    let environment = Environment::direct();
    environment.apply(
        Role::Server,
        &one_chain(json!([]), json!([{ "action": "count" }])),
    );
    let (program, file) = for_everybody(&environment.files);
    let nobody = |arguments: &[&str]| {
        let mut command = environment.namespace(Role::Server).command(&program);
        // SAFETY: system calls only, between fork and exec.
        unsafe { command.pre_exec(become_nobody) };
        let command = command.arg("--bpffs").arg(environment.folder());
        command.args(arguments).output().unwrap()
    };
    assert_eq!(
        succeeded("check", &nobody(&["check", &file])),
        "ok: 1 chain, 0 sets\n"
    );
    succeeded("policies", &nobody(&["policies"]));
    succeeded("schema", &nobody(&["schema"]));
    for arguments in [
        &["apply", &file][..],
        &["apply", "--dry-run", &file],
        &["list"],
        &["show", "t"],
        &["delete", "--all"],
        &["set", "list"],
        &["connections"],
        &["events"],
        &["events", "--wait"],
        &["agent"],
        &["testbed", "up", "nobodys"],
    ] {
        let message = failed(&format!("{arguments:?}"), 3, &nobody(arguments));
        says(&message, &["why: ", "do: ", "root"]);
    }
    let capture = environment.files.write("in.pcap", pcap(1, &[]));
    fs::set_permissions(&capture, fs::Permissions::from_mode(0o644)).unwrap();
    let replay = [
        "replay",
        &file,
        "--chain",
        "t",
        "--in",
        capture.to_str().unwrap(),
    ];
    says(&failed("replay", 3, &nobody(&replay)), &["why: ", "do: "]);
    // A file that others may not read.
    let secret = environment.files.write("secret.json", "{}");
    fs::set_permissions(&secret, fs::Permissions::from_mode(0o600)).unwrap();
    let message = failed("check", 3, &nobody(&["check", secret.to_str().unwrap()]));
    says(&message, &["cannot read", "secret.json"]);
    assert_eq!(environment.generations().len(), 1);
}

#[test]
fn no_bpffs() {
    let environment = Environment::direct();
    let file = one_chain(json!([]), json!([{ "action": "count" }]));
    let file = environment.file("t.json", &file);
    let elsewhere = environment.files.path().join("bpf");
    let output = environment
        .namespace(Role::Server)
        .command(PROGRAM)
        .args(["apply", &file, "--bpffs"])
        .arg(&elsewhere)
        .output()
        .unwrap();
    let message = failed("apply", 1, &output);
    says(
        &message,
        &["is not in a bpffs", "/sys/fs/bpf", "mount -t bpf"],
    );
    assert!(!elsewhere.exists());
}

/// In a mount namespace of its own, where nothing is mounted at `/sys/fs/bpf`.
#[test]
fn bpffs_not_mounted() {
    let environment = Environment::direct();
    let (program, file) = for_everybody(&environment.files);
    let unmounted = |how: &str| {
        let script = format!(
            "while umount /sys/fs/bpf 2> /dev/null; do :; done\n\
             exec {how} {program} --bpffs /sys/fs/bpf/pct-unmounted apply {file}"
        );
        let mut command = environment.namespace(Role::Server).command("unshare");
        command.args(["--mount", "sh", "-c", &script]);
        command.output().unwrap()
    };
    // It is mounted, and goes with the mount namespace.
    let said = succeeded("apply", &unmounted(""));
    says(&said, &["create     chain  t"]);
    assert!(!Path::new("/sys/fs/bpf/pct-unmounted").exists());
    let nobody = "setpriv --reuid 65534 --regid 65534 --clear-groups";
    let message = failed("apply", 3, &unmounted(nobody));
    says(
        &message,
        &[
            "/sys/fs/bpf is not mounted, and cannot be",
            "mount -t bpf bpf /sys/fs/bpf",
        ],
    );
}

#[test]
fn devices_that_refuse() {
    let environment = Environment::direct();
    let on = |device: &str, mode: &str| {
        let mut file = one_chain(json!([]), json!([{ "action": "count" }]));
        file["chains"][0]["attach"] = json!([{ "device": device, "hook": "xdp", "mode": mode }]);
        environment.file("on.json", &file)
    };
    let message = environment.fails(Role::Server, 1, &["apply", &on("path7", "auto")]);
    says(
        &message,
        &[
            "on.json",
            "$.chains[0].attach[0]",
            "no device path7",
            "ip -br link",
        ],
    );
    // The loopback device has no XDP of its own.
    let message = environment.fails(Role::Server, 1, &["apply", &on("lo", "native")]);
    says(
        &message,
        &[
            "on.json",
            "$.chains[0].attach[0]",
            "attach to lo",
            "native",
            "\"generic\"",
            "tc-ingress",
        ],
    );
    assert!(!environment.folder().exists());
    let other = BpfFolder::new();
    let foreign = environment
        .namespace(Role::Server)
        .command(PROGRAM)
        .arg("--bpffs")
        .arg(other.path())
        .args(["apply", &on("path1", "native")])
        .output()
        .unwrap();
    succeeded("the foreign chain", &foreign);
    for mode in ["auto", "native", "generic"] {
        let message = environment.fails(Role::Server, 1, &["apply", &on("path1", mode)]);
        says(
            &message,
            &[
                "$.chains[0].attach[0]",
                "path1 runs another XDP program",
                "\"pc_entry\", mode native",
                "xdp off",
                "tc-ingress",
            ],
        );
    }
    assert!(!environment.folder().exists());
}

#[test]
fn unknown_names() {
    let environment = Environment::direct();
    let mut file = one_chain(
        json!([{ "selector": "service", "set": "ports" }]),
        json!([{ "action": "count" }]),
    );
    file["sets"] = json!({ "ports": { "kind": "port", "size": 2 } });
    file["chains"][0]["name"] = "first".into();
    environment.apply(Role::Server, &file);
    let fails = |code, arguments: &[&str], words: &[&str]| {
        says(&environment.fails(Role::Server, code, arguments), words);
    };
    fails(
        2,
        &["delete", "fist"],
        &["\"fist\", no such chain (did you mean \"first\"?)", "list"],
    );
    fails(2, &["show", "fist"], &["did you mean \"first\"?"]);
    fails(
        2,
        &["set", "add", "prots", "port=1"],
        &["\"prots\", no such set", "set list"],
    );
    fails(2, &["set", "list", "port"], &["did you mean \"ports\"?"]);
    fails(2, &["set", "delete", "x"], &["no such set"]);
    fails(
        1,
        &["set", "delete", "ports"],
        &["ports is in use", "first", "policy-chain delete"],
    );
    fails(
        2,
        &["set", "add", "ports", "prot=1"],
        &["element 1", "did you mean \"port\"?"],
    );
    fails(
        2,
        &["set", "add", "ports", "port=1", "port=x"],
        &["element 2.port", "\"x\""],
    );
    fails(
        2,
        &["set", "add", "ports", "port=1,chain=none"],
        &["\"none\", no such chain"],
    );
    fails(
        2,
        &["set", "load", "ports", "/nonexistent"],
        &["/nonexistent", "no such file"],
    );
    let bad = environment
        .files
        .write("bad.txt", "port=1\n\n# fine\nport=70000\n");
    fails(
        2,
        &["set", "load", "ports", bad.to_str().unwrap()],
        &["bad.txt", "line 4", "70000", "65535"],
    );
    assert_eq!(environment.ok(Role::Server, &["set", "list", "ports"]), "");
    environment.ok(Role::Server, &["set", "add", "ports", "port=1", "port=2"]);
    fails(
        1,
        &["set", "add", "ports", "port=3"],
        &["ports", "full", "0 of 1", "2 elements", "size"],
    );
    let output = environment.cli(Role::Server, &["set", "del", "ports", "port=2", "port=9"]);
    assert_eq!(output.status.code(), Some(1));
    assert_eq!(text(&output.stdout), "removed 1 of 2\n");
}

#[test]
fn dry_run_and_prune() {
    let environment = Environment::direct();
    let file = |names: &[&str]| {
        let chains: Vec<Value> = names
            .iter()
            .map(|name| {
                json!({
                    "name": name,
                    "attach": [{ "device": "path1", "hook": "tc-ingress" }],
                    "actions": [{ "action": "count" }],
                })
            })
            .collect();
        environment.file(
            &format!("{}.json", names.join("-")),
            &json!({ "version": 1, "sets": { names[0]: { "kind": "port", "size": 1 } }, "chains": chains }),
        )
    };
    let change = |arguments: &[&str]| {
        let report = environment.json(Role::Server, arguments);
        let words = |part: &str| -> Vec<String> {
            let items = report[part].as_array().unwrap().iter();
            items
                .map(|item| {
                    let name = item.get("name").unwrap_or(&item["device"]);
                    format!(
                        "{} {}",
                        item["change"].as_str().unwrap(),
                        name.as_str().unwrap()
                    )
                })
                .collect()
        };
        (words("chains"), words("sets"), words("attachments"))
    };
    let names = || -> Vec<String> {
        let list = environment.json(Role::Server, &["list", "--json"]);
        let items = list.as_array().unwrap().iter();
        items
            .map(|item| item["name"].as_str().unwrap().to_owned())
            .collect()
    };
    let (a, ab, c) = (file(&["a"]), file(&["a", "b"]), file(&["c"]));
    let (chains, sets, places) = change(&["apply", "--dry-run", "--json", &ab]);
    assert_eq!(chains, ["create a", "create b"]);
    assert_eq!(sets, ["create a"]);
    assert_eq!(places, ["create path1"]);
    assert!(!environment.folder().exists());
    assert_eq!(change(&["apply", "--json", &ab]).0, chains);
    assert_eq!(names(), ["a", "b"]);
    let generations = environment.generations();
    assert_eq!(change(&["apply", "--json", &a]).2, ["unchanged path1"]);
    let (chains, sets, places) = change(&["apply", "--dry-run", "--prune", "--json", &c]);
    assert_eq!(chains, ["remove a", "remove b", "create c"]);
    assert_eq!(sets, ["remove a", "create c"]);
    assert_eq!(places, ["replace path1"]);
    assert_eq!(names(), ["a", "b"]);
    assert_eq!(environment.generations(), generations);
    let said = environment.ok(Role::Server, &["apply", "--prune", &c]);
    says(
        &said,
        &[
            "remove     chain  a",
            "create     chain  c",
            "remove     set    a",
        ],
    );
    assert_eq!(names(), ["c"]);
    environment.ok(Role::Server, &["delete", "c"]);
    assert_eq!(names(), Vec::<String>::new());
    // The set is still there.
    assert_eq!(
        environment.json(Role::Server, &["set", "list", "--json"])[0]["name"],
        "c"
    );
    environment.ok(Role::Server, &["set", "delete", "c"]);
    assert!(!environment.folder().exists());
}

/// The keys of an object, in order.
fn keys(value: &Value) -> Vec<&str> {
    value
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect()
}

#[test]
fn shapes_of_json() {
    let environment = Environment::direct();
    let list = |arguments: &[&str]| environment.json(Role::Server, arguments);
    assert_eq!(list(&["list", "--json"]), json!([]));
    assert_eq!(list(&["set", "list", "--json"]), json!([]));
    environment.apply(
        Role::Server,
        &json!({
            "version": 1,
            "sets": { "s": { "kind": "flow", "size": 5 } },
            "chains": [
                {
                    "name": "t",
                    "priority": 5,
                    "attach": [
                        { "device": "path1", "hook": "xdp" },
                        { "device": "path1", "hook": "tc-egress" },
                    ],
                    "selectors": [{ "selector": "tcp" }, { "selector": "flow", "op": "or", "set": "s" }],
                    "actions": [{ "action": "set_mss", "bytes": 9000 }],
                    "then": { "goto": "sub" },
                },
                { "name": "sub", "then": "drop", "selectors": [{ "selector": "tcp", "not": true }] },
            ],
        }),
    );
    Connection::open(&environment, server_addresses(&environment)[0], PORT).exchange(3);
    let chains = list(&["list", "--json"]);
    let [t, sub] = &chains.as_array().unwrap()[..] else {
        panic!("{chains}");
    };
    let members = [
        "name",
        "priority",
        "attach",
        "absent",
        "selectors",
        "actions",
        "then",
        "packets",
        "bytes",
    ];
    assert_eq!(keys(t), members);
    assert_eq!(keys(sub), members);
    assert_eq!((&t["name"], &t["priority"]), (&json!("t"), &json!(5)));
    assert_eq!(t["then"], json!({ "goto": "sub" }));
    assert_eq!(sub["attach"], json!([]));
    assert_eq!((&t["absent"], &sub["absent"]), (&json!([]), &json!([])));
    let places = [
        "device",
        "hook",
        "mode",
        "generation",
        "carrier",
        "checksum",
        "learners",
        "netns",
        "packets",
        "bytes",
    ];
    assert_eq!(keys(&t["attach"][0]), places);
    assert_eq!(t["attach"][0]["mode"], "native");
    assert_eq!(t["attach"][1]["hook"], "tc-egress");
    assert_eq!(t["attach"][1]["mode"], "tcx");
    let sum: u64 = (0..2)
        .map(|at| t["attach"][at]["packets"].as_u64().unwrap())
        .sum();
    assert_eq!(t["packets"].as_u64().unwrap(), sum);
    assert!(sum > 6);

    let shown = list(&["show", "t", "--json"]);
    assert_eq!(keys(&shown), [&members[..], &["nodes"]].concat());
    let place = &shown["nodes"][0];
    assert_eq!(keys(place), ["device", "hook", "entry", "nodes"]);
    assert_eq!(
        keys(&place["entry"]),
        ["seen", "packets", "bytes", "reasons"]
    );
    let nodes = place["nodes"].as_array().unwrap();
    let names: Vec<&Value> = nodes.iter().map(|node| &node["node"]).collect();
    assert_eq!(names, ["t/0:tcp", "t/1:flow", "t/2:set_mss"]);
    assert_eq!(
        keys(&nodes[2]),
        [
            "node", "policy", "kind", "seen", "packets", "bytes", "reasons"
        ]
    );
    assert_eq!(nodes[2]["kind"], "action");
    assert_eq!(nodes[2]["reasons"]["not_lower"], 1);
    assert!(nodes[2]["reasons"]["not_syn"].as_u64() > Some(2));

    let sets = list(&["set", "list", "--json"]);
    assert_eq!(sets, json!([{ "name": "s", "kind": "flow", "size": 5 }]));
    let element = "local=10.0.0.1,remote=fd00::1,local_port=1,remote_port=2,protocol=udp,arg=7";
    environment.ok(Role::Server, &["set", "add", "s", element]);
    let object = json!({
        "local": "10.0.0.1", "remote": "fd00::1", "local_port": 1, "remote_port": 2,
        "protocol": "udp", "arg": 7,
    });
    assert_eq!(list(&["set", "list", "s", "--json"]), json!([object]));
    assert_eq!(
        environment.ok(Role::Server, &["set", "list", "s"]),
        format!("{element}\n")
    );
    for arguments in [
        &["list"][..],
        &["show", "t"],
        &["policies"],
        &["policies", "flow"],
    ] {
        let table = environment.ok(Role::Server, arguments);
        let widest = table.lines().map(|line| line.chars().count()).max();
        assert!(widest <= Some(100), "{table}");
    }
}

#[test]
fn policies_and_testbeds_as_json() {
    let parse = |arguments: &[&str]| -> Value {
        serde_json::from_str(&succeeded("json", &run(arguments))).unwrap()
    };
    let all = parse(&["policies", "--json"]);
    let policies = all["policies"].as_array().unwrap();
    let names: Vec<&str> = policies
        .iter()
        .map(|p| p["name"].as_str().unwrap())
        .collect();
    for name in [
        "flow",
        "ip_pair",
        "prefix",
        "service",
        "tcp",
        "tcp_flags",
        "count",
        "drop",
        "goto",
        "insert_option",
        "pass",
        "redirect",
        "add_subflow",
        "hold_add_addr",
        "mp_prio",
        "mptcp",
        "mptcp_connection",
        "record",
        "remove_addr",
        "report",
        "reset_subflow",
        "restore_add_addr",
        "set_mss",
        "set_window",
        "strip_option",
    ] {
        assert!(names.contains(&name), "{names:?}");
        let one = parse(&["policies", name, "--json"]);
        assert!(policies.contains(&one), "{one}");
        assert_eq!(
            keys(&one),
            [
                "name",
                "kind",
                "doc",
                "terminal",
                "once",
                "hooks",
                "parameters",
                "set"
            ]
        );
        for parameter in one["parameters"].as_array().unwrap() {
            for member in ["name", "type", "values", "doc", "required", "default"] {
                assert!(parameter.get(member).is_some(), "{parameter}");
            }
            assert!(!parameter["doc"].as_str().unwrap().is_empty());
        }
    }
    let environment = Environment::routed();
    let name = environment.testbed.name();
    assert!(
        parse(&["testbed", "list", "--json"])
            .as_array()
            .unwrap()
            .contains(&name.into())
    );
    let made = environment.testbed.describe().to_json();
    assert_eq!(keys(&made), ["testbed", "namespaces", "paths"]);
    assert_eq!(
        keys(&made["paths"][0]),
        ["path", "client", "router", "server"]
    );
    let code = run(&[
        "testbed", "exec", name, "router", "--", "sh", "-c", "exit 7",
    ]);
    assert_eq!(code.status.code(), Some(7));
    let message = failed(
        "exec",
        2,
        &run(&["testbed", "exec", name, "ruoter", "--", "true"]),
    );
    says(&message, &["did you mean \"router\"?"]);
    let message = failed("up", 1, &run(&["testbed", "up", name]));
    says(&message, &["exists", "testbed down"]);
}

/// The schema that editors use is the one this program prints.
#[test]
fn schema_is_committed() {
    let printed = succeeded("schema", &run(&["schema"]));
    let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("schema/chain-file.schema.json");
    let committed = fs::read_to_string(&file).unwrap_or_default();
    assert!(
        printed == committed,
        "schema/chain-file.schema.json is not what the program prints; make it again with \
         `make schema`"
    );
}

// ---- replay ----------------------------------------------------------------------------------

const ETHERNET: u32 = 1;
const RAW_IP: u32 = 101;
const LINUX_COOKED: u32 = 113;
const LINUX_COOKED_2: u32 = 276;

/// A packet of a capture: seconds, microseconds, bytes.
type Record = (u32, u32, Vec<u8>);

fn pcap(link_type: u32, records: &[Record]) -> Vec<u8> {
    let mut file = Vec::new();
    for word in [0xa1b2_c3d4u32, 4 << 16 | 2, 0, 0, 262_144, link_type] {
        file.extend(word.to_le_bytes());
    }
    for (seconds, micros, data) in records {
        let length = data.len() as u32;
        for word in [*seconds, *micros, length, length] {
            file.extend(word.to_le_bytes());
        }
        file.extend(data);
    }
    file
}

fn read_pcap(file: &Path, link_type: u32) -> Vec<Record> {
    let bytes = fs::read(file).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    assert_eq!((word(0), word(20)), (0xa1b2_c3d4, link_type));
    let mut records = Vec::new();
    let mut at = 24;
    while at < bytes.len() {
        let length = word(at + 8) as usize;
        let data = bytes[at + 16..at + 16 + length].to_vec();
        records.push((word(at), word(at + 4), data));
        at += 16 + length;
    }
    records
}

/// A pcapng block.
fn block(kind: u32, body: &[u8]) -> Vec<u8> {
    let length = 12 + body.len().next_multiple_of(4) as u32;
    let mut block = kind.to_le_bytes().to_vec();
    block.extend(length.to_le_bytes());
    block.extend(body);
    block.resize(length as usize - 4, 0);
    block.extend(length.to_le_bytes());
    block
}

fn words(words: &[u32]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_le_bytes()).collect()
}

fn pcapng(records: &[Record]) -> Vec<u8> {
    let mut file = block(0x0a0d_0d0a, &words(&[0x1a2b_3c4d, 1, u32::MAX, u32::MAX]));
    file.extend(block(1, &words(&[ETHERNET, 262_144])));
    for (seconds, micros, data) in records {
        let time = u64::from(*seconds) * 1_000_000 + u64::from(*micros);
        let length = data.len() as u32;
        let mut body = words(&[0, (time >> 32) as u32, time as u32, length, length]);
        body.extend(data);
        file.extend(block(6, &body));
    }
    file
}

fn read_pcapng(file: &Path) -> Vec<Record> {
    let bytes = fs::read(file).unwrap();
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap());
    let mut records = Vec::new();
    let mut at = 0;
    while at < bytes.len() {
        if word(at) == 6 {
            let time = u64::from(word(at + 12)) << 32 | u64::from(word(at + 16));
            let length = word(at + 20) as usize;
            let data = bytes[at + 28..at + 28 + length].to_vec();
            records.push(((time / 1_000_000) as u32, (time % 1_000_000) as u32, data));
        }
        at += word(at + 4) as usize;
    }
    records
}

/// A TCP segment with timestamps to a port, as an IPv4 packet.
fn ip_packet(port: u16, payload: usize) -> Vec<u8> {
    let timestamps = [1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 2];
    let builder = etherparse::PacketBuilder::ipv4([10, 0, 0, 1], [10, 0, 0, 2], 64)
        .tcp(40_000, port, 1, 1000)
        .ack(1)
        .options_raw(&timestamps)
        .unwrap();
    let mut packet = Vec::new();
    builder.write(&mut packet, &vec![7; payload]).unwrap();
    packet
}

fn ethernet(packet: &[u8]) -> Vec<u8> {
    let header = [2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2, 8, 0];
    [&header, packet].concat()
}

/// A chain that changes port 80, drops port 81, and leaves the rest alone.
struct Replay {
    files: Files,
    chain: String,
}

impl Replay {
    fn new() -> Replay {
        common::require_root();
        let chains = json!([
            {
                "name": "t",
                "attach": [{ "device": "nowhere0", "hook": "tc-ingress" }],
                "selectors": [{ "selector": "service", "local_port": [80, 81] }],
                "actions": [
                    { "action": "strip_option", "kind": "timestamps" },
                    { "action": "set_mss", "bytes": 100 },
                ],
                "then": { "goto": "rest" },
            },
            {
                "name": "rest",
                "selectors": [{ "selector": "service", "local_port": 81 }],
                "then": "drop",
            },
        ]);
        let files = Files::new();
        let file = json!({ "version": 1, "chains": chains });
        let chain = files.write("t.json", file.to_string());
        let chain = chain.to_str().unwrap().to_owned();
        Replay { files, chain }
    }

    /// Runs a capture; the lines printed, and the name of the file written.
    fn run(&self, capture: Vec<u8>, more: &[&str]) -> (Vec<Value>, std::path::PathBuf) {
        let input = self.files.write("in", capture);
        let output = self.files.path().join("out");
        let (from, to) = (input.to_str().unwrap(), output.to_str().unwrap());
        let arguments = [
            "replay",
            &self.chain,
            "--chain",
            "t",
            "--in",
            from,
            "--out",
            to,
            "--json",
        ];
        let printed = succeeded("replay", &run(&[&arguments[..], more].concat()));
        let lines = printed
            .lines()
            .map(|line| serde_json::from_str(line).unwrap());
        (lines.collect(), output)
    }
}

fn check_three(lines: &[Value]) {
    let [changed, dropped, other] = lines else {
        panic!("{lines:?}");
    };
    for (at, line) in (1..).zip(lines) {
        assert_eq!(
            keys(line),
            [
                "packet", "verdict", "matched", "path", "changed", "reasons", "carrier"
            ]
        );
        assert_eq!(line["packet"], at);
        assert_eq!(line["carrier"], "test_run");
    }
    let path = json!([
        "t/0:service",
        "t/1:strip_option",
        "t/2:set_mss",
        "rest/0:service"
    ]);
    assert_eq!(changed["path"], path);
    assert_eq!(changed["verdict"], "pass");
    assert_eq!(changed["matched"], true);
    assert_eq!(changed["changed"], true);
    assert_eq!(changed["reasons"], json!(["not_syn"]));
    assert_eq!(dropped["path"][3], "rest/0:service");
    assert_eq!(dropped["verdict"], "drop");
    assert_eq!(other["path"], json!(["t/0:service"]));
    assert_eq!(other["verdict"], "pass");
    assert_eq!(other["matched"], false);
    assert_eq!(other["changed"], false);
    assert_eq!(other["reasons"], json!([]));
}

/// The first and third of what went in, the first without its timestamps.
fn check_written(read: &[Record], written: &[Record], tcp: usize) {
    let [first, last] = written else {
        panic!("{written:?}");
    };
    assert_eq!(last, &read[2]);
    assert_eq!((first.0, first.1), (read[0].0, read[0].1));
    assert_eq!(first.2.len(), read[0].2.len());
    assert_eq!(first.2[..tcp + 16], read[0].2[..tcp + 16]);
    assert_eq!(first.2[tcp + 20..tcp + 32], [1; 12]);
    assert_eq!(first.2[tcp + 32..], read[0].2[tcp + 32..]);
}

fn three(wrap: impl Fn(Vec<u8>) -> Vec<u8>) -> Vec<Record> {
    vec![
        (1_700_000_000, 5, wrap(ip_packet(80, 10))),
        (1_700_000_001, 999_999, wrap(ip_packet(81, 10))),
        (1_700_000_002, 0, wrap(ip_packet(82, 11))),
    ]
}

#[test]
fn replay_of_pcap_and_pcapng() {
    let replay = Replay::new();
    let records = three(|packet| ethernet(&packet));
    for hook in ["xdp", "tc-ingress"] {
        let (lines, output) = replay.run(pcap(ETHERNET, &records), &["--hook", hook]);
        check_three(&lines);
        check_written(&records, &read_pcap(&output, ETHERNET), 34);
        let (lines, output) = replay.run(pcapng(&records), &["--hook", hook]);
        check_three(&lines);
        check_written(&records, &read_pcapng(&output), 34);
    }
    // On egress the ports are the other way round.
    let (lines, _) = replay.run(pcap(ETHERNET, &records), &["--hook", "tc-egress"]);
    assert!(lines.iter().all(|line| line["matched"] == false));
}

#[test]
fn replay_of_other_link_types() {
    let replay = Replay::new();
    let cooked = [&[0, 0, 0, 1, 0, 6, 2, 0, 0, 0, 0, 2, 0, 0][..], &[8, 0]].concat();
    let cooked_2 = [
        &[8, 0, 0, 0, 0, 0, 0, 3, 0, 1, 0, 6][..],
        &[2, 0, 0, 0, 0, 2, 0, 0],
    ]
    .concat();
    for (link_type, header) in [
        (RAW_IP, vec![]),
        (LINUX_COOKED, cooked),
        (LINUX_COOKED_2, cooked_2),
    ] {
        let records = three(|packet| [header.clone(), packet].concat());
        let (lines, output) = replay.run(pcap(link_type, &records), &[]);
        check_three(&lines);
        check_written(&records, &read_pcap(&output, link_type), header.len() + 20);
    }
}

/// Frames that the kernel's test run does not take go over a device.
#[test]
fn replay_of_frames_that_test_run_refuses() {
    let replay = Replay::new();
    let short = [&ethernet(&[])[..], &[0x45, 0, 0, 40]].concat();
    let records = vec![
        (1, 1, ethernet(&ip_packet(80, 5000))),
        (2, 2, short.clone()),
        (3, 3, vec![1; 10]),
        (4, 4, ethernet(&ip_packet(81, 5000))),
        (5, 5, ethernet(&ip_packet(80, 10))),
    ];
    let (lines, output) = replay.run(pcap(ETHERNET, &records), &["--hook", "tc-ingress"]);
    let carriers: Vec<&Value> = lines.iter().map(|line| &line["carrier"]).collect();
    assert_eq!(carriers, ["veth", "veth", "none", "veth", "test_run"]);
    assert_eq!(lines[0]["changed"], true);
    assert_eq!(lines[0]["matched"], true);
    assert_eq!(lines[0]["path"][3], "rest/0:service");
    assert_eq!(lines[1]["changed"], false);
    assert_eq!(lines[1]["reasons"], json!(["truncated"]));
    assert_eq!(lines[2]["reasons"], json!(["truncated"]));
    let verdicts: Vec<&Value> = lines.iter().map(|line| &line["verdict"]).collect();
    assert_eq!(verdicts, ["pass", "pass", "pass", "drop", "pass"]);
    let written = read_pcap(&output, ETHERNET);
    assert_eq!(written.len(), 4);
    assert_eq!(written[0].2[54..66], [1; 12]);
    assert_eq!(written[1], records[1]);
    assert_eq!(written[2], records[2]);
}

#[test]
fn replay_of_bad_files() {
    let replay = Replay::new();
    let input = |name: &str, bytes: &[u8]| {
        let path = replay.files.write(name, bytes);
        path.to_str().unwrap().to_owned()
    };
    let good = input("good", &pcap(ETHERNET, &three(|packet| ethernet(&packet))));
    let fails = |code, chain: &str, from: &str, words: &[&str]| {
        let output = run(&["replay", &replay.chain, "--chain", chain, "--in", from]);
        says(&failed(&format!("{chain} {from}"), code, &output), words);
    };
    fails(
        2,
        "tt",
        &good,
        &["--chain", "did you mean \"t\"?", "t, rest"],
    );
    fails(2, "t", "/nonexistent", &["/nonexistent"]);
    fails(
        2,
        "t",
        &input("text", b"This is no capture at all."),
        &["text", "pcap"],
    );
    fails(
        2,
        "t",
        &input("kind", &pcap(147, &[(1, 1, vec![0; 60])])),
        &["147"],
    );
    let cut = fs::read(&good).unwrap();
    fails(2, "t", &input("cut", &cut[..cut.len() - 5]), &["cut"]);
}
