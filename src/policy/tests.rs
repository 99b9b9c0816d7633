// SPDX-License-Identifier: MIT OR Apache-2.0
//! Objects compiled by clang, read, packed, unpacked and printed.

#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::sync::OnceLock;

use serde_json::{Map, Value, json};

use super::fixture::{EVERYTHING, FLOW, GUARDED, PREFIX, compile, compile_alone};
use super::*;
use crate::error::Invalid;

struct TestNames;

impl Names for TestNames {
    fn device(&self, name: &str) -> Result<u32, String> {
        (name == "eth0")
            .then_some(7)
            .ok_or_else(|| "no such device".to_owned())
    }
    fn chain(&self, name: &str) -> Result<u32, String> {
        (name == "slow")
            .then_some(9)
            .ok_or_else(|| "no such chain".to_owned())
    }
    fn service(&self, name: &str) -> Option<u16> {
        match name {
            "https" => Some(443),
            "http-alt" => Some(8080),
            _ => None,
        }
    }
}

impl ReverseNames for TestNames {
    fn device(&self, index: u32) -> Option<String> {
        (index == 7).then(|| "eth0".to_owned())
    }
    fn chain(&self, id: u32) -> Option<String> {
        (id == 9).then(|| "slow".to_owned())
    }
}

fn policies() -> &'static Registry {
    static REGISTRY: OnceLock<Registry> = OnceLock::new();
    REGISTRY.get_or_init(|| {
        let sources = [
            ("prefix", PREFIX),
            ("flow", FLOW),
            ("everything", EVERYTHING),
        ];
        let objects = sources.map(|(name, source)| {
            let object: &'static [u8] = compile(source).leak();
            EmbeddedPolicy {
                name,
                xdp: object,
                tc: object,
            }
        });
        Registry::new(&objects).unwrap()
    })
}

fn params() -> &'static Layout {
    let policy = policies().action("everything").unwrap();
    policy.params.as_ref().unwrap()
}

fn key(kind: &str) -> &'static Layout {
    &policies().set_kind(kind).unwrap().layout
}

fn object(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

fn pack(value: Value) -> Result<Packed, Invalid> {
    params().pack(&object(value), "$.a", &["action"], &TestNames, true)
}

/// Packs `window`, which is required, and one more member; its bytes.
fn packed(name: &str, value: Value) -> Result<Vec<u8>, Invalid> {
    let packed = pack(json!({ "window": 1, name: value }))?;
    let field = params().field(name).unwrap();
    let count = field.array.map_or(1, |array| array.capacity);
    let end = field.offset + field.ty.size() * count;
    Ok(packed.bytes[field.offset..end].to_vec())
}

#[track_caller]
fn refused(name: &str, value: Value, parts: &[&str]) {
    let invalid = packed(name, value).unwrap_err();
    assert!(
        invalid.path.starts_with(&format!("$.a.{name}")),
        "{invalid}"
    );
    let text = invalid.to_string();
    for part in parts {
        assert!(text.contains(part), "no {part:?} in\n{text}");
    }
}

#[track_caller]
fn build_error(name: &str, source: &str, parts: &[&str]) {
    let error = btf::read(&compile(source), name).unwrap_err().to_string();
    for part in parts {
        assert!(error.contains(part), "no {part:?} in: {error}");
    }
}

/// A policy whose only parameter is `declaration`.
fn with_member(declaration: &str) -> String {
    format!(
        "enum color {{ COLOR_RED = 1, COLOR_BIG = 300 }};
         const volatile enum color keep_color;
         struct params {{ {declaration} }}; PARAMS;
         ACTION(x, \"does\") {{ return *(const volatile __u8 *)&params + node.next; }}"
    )
}

#[track_caller]
fn member_error(declaration: &str, parts: &[&str]) {
    build_error("x", &with_member(declaration), parts);
}

#[test]
fn describes_a_policy() {
    let policy = policies().action("everything").unwrap();
    assert_eq!(policy.doc, "has every type");
    assert!(policy.terminal);
    assert_eq!(policy.hooks, btf::HOOKS);
    assert_eq!(policy.key, None);
    assert_ne!(policy.params_offset, policy.node_offset);
    let mut offsets = [policy.params_offset, policy.node_offset];
    offsets.sort_unstable();
    assert!(offsets[1] >= 8, "libbpf fills offsets in: {offsets:?}");

    let flow = policies().selector("flow").unwrap();
    assert_eq!(flow.hooks, ["xdp", "tc-egress"]);
    assert!(!flow.runs_at(Hook::TcIngress));
    assert!(!flow.terminal);
    assert_eq!(flow.key.as_ref().unwrap().kind, "flow");
    assert_eq!(key("flow").size, 36);
    assert_eq!(key("flow").name, "flow_key");
    assert!(policies().selector("prefix").unwrap().params.is_none());
    assert!(policies().action("flow").is_none());
    let kinds: Vec<&str> = policies().set_kinds().map(|key| &*key.kind).collect();
    assert_eq!(kinds, ["flow", "prefix"]);
}

#[test]
fn describes_members() {
    let names: Vec<&str> = params().fields.iter().map(|field| &*field.name).collect();
    assert!(!names.contains(&"raw_len") && !names.contains(&"pad") && !names.contains(&"some_len"));
    assert!(names.contains(&"header_len"));
    let field = |name| params().field(name).unwrap();
    assert!(field("window").required);
    assert_eq!(field("window").doc, "receive window");
    assert_eq!(field("ttl").range, Some((1, 64)));
    assert_eq!(field("ttl").default.as_deref(), Some("32"));
    assert_eq!(field("wait").ty, FieldType::Duration);
    assert_eq!(
        field("mode").ty,
        FieldType::Enum {
            size: 1,
            flags: false,
            names: vec![("fast".to_owned(), 0), ("slow".to_owned(), 1)],
        }
    );
    let FieldType::Enum { size, names, .. } = &field("kind").ty else {
        panic!("not an enum");
    };
    assert_eq!(
        (*size, names.len()),
        (4, 3),
        "__OPTION_KIND_MAX is no value"
    );
    assert!(matches!(
        field("flags_set").ty,
        FieldType::Enum {
            size: 1,
            flags: true,
            ..
        }
    ));
    assert_eq!(field("some").array.unwrap().length_size, 2);
}

#[test]
fn build_rules_for_programs() {
    let good = "ACTION(x, \"does\") { return node.next; }";
    btf::read(&compile(good), "x").unwrap();
    build_error("y", good, &["policy y", "`pc_x`", "`pc_y`"]);
    build_error(
        "x",
        "SEC(\"xdp\") int pc_x(void *ctx) { return node.next; }",
        &["no function"],
    );
    build_error(
        "x",
        &format!("{good} {}", good.replace("(x", "(z")),
        &["more than one"],
    );
    build_error(
        "x",
        "ACTION(x, \" \") { return node.next; }",
        &["not documented"],
    );
    build_error(
        "x",
        "TAG(\"terminal\") SELECTOR(x, \"y\") { return node.next; }",
        &["neither terminal nor once"],
    );
    build_error(
        "x",
        "TAG(\"once\") SELECTOR(x, \"y\") { return node.next; }",
        &["neither terminal nor once"],
    );
    let once = btf::read(&compile(&format!("TAG(\"once\") {good}")), "x").unwrap();
    assert!(once.once && !once.terminal);
    build_error("x", &format!("TAG(\"selector\") {good}"), &["both"]);
    build_error(
        "x",
        &format!("TAG(\"hooks:xdp,tc\") {good}"),
        &["`tc`", "tc-egress"],
    );
    build_error(
        "x",
        &format!("TAG(\"terminl\") {good}"),
        &["unknown tag \"terminl\""],
    );
    let alone = "__attribute__((btf_decl_tag(\"action\"), btf_decl_tag(\"doc:x\"), \
                 section(\"xdp\"))) int pc_x(void *ctx) { return 0; }";
    let error = btf::read(&compile_alone(alone), "x").unwrap_err();
    assert!(error.to_string().contains("policy.h"), "{error}");
    let error = btf::read(b"not an object", "x").unwrap_err();
    assert!(error.to_string().contains("BPF object"), "{error}");
    assert!(btf::read(&[], "x").is_err());
    assert!(btf::read(b"x", "a\0b").is_err());
}

#[test]
fn build_rules_for_members() {
    member_error(
        "__u8 a;",
        &["struct params", "member `a`", "not documented"],
    );
    member_error("__u8 a DOC(\"\");", &["not documented"]);
    member_error("int a DOC(\"x\");", &["type `int`", "known types: __u8"]);
    member_error("__u8 *a DOC(\"x\");", &["which JSON cannot describe"]);
    member_error(
        "struct { __u8 b; } a DOC(\"x\");",
        &["which JSON cannot describe"],
    );
    member_error("struct { __u8 b; };", &["member 0 has no name"]);
    member_error("__u8 a:3 DOC(\"x\");", &["bit field"]);
    member_error("__u8 set DOC(\"x\");", &["`set`", "reserved"]);
    member_error(
        "__u8 a DOC(\"x\") TAG(\"requird\");",
        &["unknown tag \"requird\""],
    );
    member_error("__u8 a DOC(\"x\") TAG(\"range:1-2\");", &["LO..HI"]);
    member_error("__u8 a DOC(\"x\") TAG(\"range:5..2\");", &["LO..HI"]);
    member_error(
        "__u8 a DOC(\"x\") TAG(\"range:0..256\");",
        &["256 is above 255"],
    );
    member_error(
        "ip_t a DOC(\"x\") TAG(\"range:0..2\");",
        &["needs an integer"],
    );
    member_error(
        "__u8 a DOC(\"x\") TAG(\"flags\");",
        &["\"flags\" needs an enum"],
    );
    member_error("__u8 a DOC(\"x\") TAG(\"enum:color\");", &["unknown tag"]);
    member_error("__u8 a[4] DOC(\"x\");", &["add `__u8 a_len;`"]);
    member_error("__u8 a[4] DOC(\"x\"); __be16 a_len;", &["`a_len` must be"]);
    member_error("__u8 a[300] DOC(\"x\"); __u8 a_len;", &["300", "count"]);
    member_error("bytes_t a DOC(\"x\");", &["must be an array"]);
    member_error("device_t a DOC(\"x\") TAG(\"default:eth0\");", &["default"]);
    for guard in ["0", "0:b"] {
        member_error(
            &format!("__u8 a DOC(\"x\") TAG(\"guard:{guard}\"); bool b DOC(\"x\");"),
            &["expected VALUE:MEMBER:WHY"],
        );
    }
    for by in ["c", "a"] {
        member_error(
            &format!("__u8 a DOC(\"x\") TAG(\"guard:0:{by}:it ends\"); bool b DOC(\"x\");"),
            &["a: tag \"guard:\" names no bool member"],
        );
    }
    member_error(
        "__u8 a DOC(\"x\") TAG(\"required\") TAG(\"default:1\");",
        &["both required"],
    );
    let fine = with_member("enum color a DOC(\"x\"); __u8 pad[2];");
    btf::read(&compile(&fine), "x").unwrap();
    let hidden = with_member("__u8 a DOC(\"x\");").replace("PARAMS", "static PARAMS");
    build_error("x", &hidden, &["must not be static"]);
}

fn guarded() -> &'static Policy {
    static POLICY: OnceLock<Policy> = OnceLock::new();
    POLICY.get_or_init(|| {
        let object: &'static [u8] = compile(GUARDED).leak();
        let embedded = EmbeddedPolicy {
            name: "guarded",
            xdp: object,
            tc: object,
        };
        Policy::new(embedded).unwrap()
    })
}

#[test]
fn guarded_values_need_their_bool() {
    let layout = guarded().params.as_ref().unwrap();
    let pack = |value: Value| layout.pack(&object(value), "$.a", &[], &TestNames, true);
    let cases = [
        ("id", json!(0), "it ends all"),
        ("kind", json!("mptcp"), "it breaks"),
        ("kind", json!(30), "it breaks"),
    ];
    for (name, value, why) in cases {
        for sure in [None, Some(false)] {
            let mut values = json!({ name: value });
            if let Some(sure) = sure {
                values["sure"] = sure.into();
            }
            let invalid = pack(values).unwrap_err();
            assert_eq!(invalid.path, format!("$.a.{name}"));
            assert!(invalid.found.ends_with(why), "{invalid}");
            assert!(invalid.expected.contains("\"sure\": true"), "{invalid}");
            assert!(invalid.advice.contains("add \"sure\": true"), "{invalid}");
        }
        pack(json!({ name: value, "sure": true })).unwrap();
    }
    for fine in [
        json!({ "id": 30 }),
        json!({ "kind": "mss" }),
        json!({ "kind": 0 }),
        json!({ "kind": 31 }),
        json!({ "kind": { "from": "element" } }),
    ] {
        pack(fine).unwrap();
    }
}

#[test]
fn state_depends_on_parameters() {
    let policy = guarded();
    assert!(policy.once);
    assert_eq!(policy.state, ["pcd_seen", "pcn_all"], "not pc_scratch");
    let uses = |value: Value| !policy.state_with(&object(value)).is_empty();
    assert!(uses(json!({ "kind": "mss" })));
    assert!(uses(json!({ "kind": 2 })), "by number");
    assert!(uses(json!({ "kind": { "from": "element" } })));
    for other in [
        json!({}),
        json!({ "kind": "none" }),
        json!({ "kind": 3 }),
        json!({ "kind": "mss", "blind": true }),
    ] {
        assert!(!uses(other.clone()), "{other}");
    }
    assert!(uses(json!({ "kind": "mss", "blind": false })));
}

#[test]
fn tokens_are_hex_digits() {
    let layout = guarded().params.as_ref().unwrap();
    let field = layout.field("token").unwrap();
    assert_eq!(field.ty, FieldType::Token);
    let pack = |value: Value| {
        layout.pack(
            &object(json!({ "token": value })),
            "$",
            &[],
            &TestNames,
            true,
        )
    };
    for (text, token) in [
        ("5e1cb2d0", 0x5e1c_b2d0_u32),
        ("0x5E1CB2D0", 0x5e1c_b2d0),
        ("1", 1),
        ("ffffffff", u32::MAX),
    ] {
        let bytes = pack(json!(text)).unwrap().bytes;
        assert_eq!(bytes[field.offset..][..4], token.to_ne_bytes(), "{text}");
        let back = layout.unpack(&bytes, &TestNames);
        assert_eq!(back["token"], format!("{token:08x}"));
    }
    for wrong in [
        json!("0"),
        json!(""),
        json!("0x"),
        json!("+1"),
        json!("123456789"),
        json!("5g"),
        json!(5),
    ] {
        let invalid = pack(wrong).unwrap_err();
        assert!(invalid.expected.contains("1 to 8 hex digits"), "{invalid}");
    }
    let schema = layout.schema();
    assert!(
        schema["properties"]["token"]["pattern"]
            .as_str()
            .unwrap()
            .contains("{1,8}")
    );
    let page = policy_page(guarded());
    assert!(page.contains("once per flow, unless"), "{page}");
    assert_eq!(policy_json(guarded())["once"], json!(true));
}

#[test]
fn build_rules_for_sets() {
    let with = |find: &str, replace: &str| {
        assert!(FLOW.contains(find));
        FLOW.replace(find, replace)
    };
    build_error(
        "flow",
        &with("port_t remote_port", "__u64 n"),
        &["hole of 6 bytes", "`n`"],
    );
    let odd = with("port_t remote_port", "__u8 remote_port");
    build_error(
        "flow",
        &odd,
        &["struct flow_key", "hole of 1 bytes at the end"],
    );
    build_error(
        "flow",
        &with("port_t remote_port DOC", "port_t arg DOC"),
        &["`arg`"],
    );
    build_error(
        "flow",
        &with("DOC(\"remote port\")", ""),
        &["flow_key", "`remote_port`"],
    );
    let renamed = FLOW.replace("flow_key", "flow").replace(
        "SET(flow)",
        "struct { int (*type)[1]; struct flow *key; struct element *value; } set SEC(\".maps\")",
    );
    build_error("flow", &renamed, &["struct `flow`", "`flow_key`"]);
    let sized = with(
        "SET(flow)",
        "struct { int (*type)[1]; int (*key_size)[4]; } set SEC(\".maps\")",
    );
    build_error("flow", &sized, &["__type(key"]);
    let value = with(
        "SET(flow)",
        "struct { int (*type)[1]; struct flow_key *key; __u32 *value; } set SEC(\".maps\")",
    );
    build_error("flow", &value, &["__type(value, struct element)"]);
}

#[test]
fn registry_refuses_conflicts() {
    let embedded = |name, source: &str| {
        let object: &'static [u8] = compile(source).leak();
        EmbeddedPolicy {
            name,
            xdp: object,
            tc: object,
        }
    };
    let flow = embedded("flow", FLOW);
    let error = Registry::new(&[flow, flow]).unwrap_err().to_string();
    assert!(error.contains("two selectors are called flow"), "{error}");
    let other = FLOW
        .replace("SELECTOR(flow", "SELECTOR(other")
        .replace("local address", "new");
    let error = Registry::new(&[flow, embedded("other", &other)]).unwrap_err();
    assert!(
        error.to_string().contains("struct flow_key differs"),
        "{error}"
    );
    let error = Policy::new(EmbeddedPolicy { tc: &[], ..flow }).unwrap_err();
    assert!(error.to_string().contains("no object"), "{error}");
    let bad = with_member("__u8 a DOC(\"x\") TAG(\"range:1..5\") TAG(\"default:6\");");
    let error = Policy::new(embedded("x", &bad)).unwrap_err().to_string();
    assert!(
        error.contains("params.a (default)") && error.contains("1 to 5"),
        "{error}"
    );
    let tc_only = FLOW.replace("hooks:tc-egress,xdp", "hooks:tc-egress");
    let tc_only = Policy::new(EmbeddedPolicy {
        xdp: &[],
        ..embedded("flow", &tc_only)
    })
    .unwrap();
    assert!(tc_only.object(Family::Xdp).is_empty());
    Registry::embedded().unwrap();
}

#[test]
fn packs_every_type() {
    let rows = [
        ("window", json!(1460), vec![0x05, 0xb4]),
        ("ttl", json!(64), vec![64]),
        ("fast", json!(true), vec![1]),
        (
            "mark",
            json!(0x0102_0304),
            0x0102_0304u32.to_ne_bytes().to_vec(),
        ),
        ("big", json!(u64::MAX), vec![255; 8]),
        ("token", json!(1), vec![0, 0, 0, 1]),
        ("key64", json!(258), vec![0, 0, 0, 0, 0, 0, 1, 2]),
        ("kind", json!("mptcp"), 30u32.to_ne_bytes().to_vec()),
        ("kind", json!(253), 253u32.to_ne_bytes().to_vec()),
        ("flags_set", json!("syn"), vec![2]),
        ("flags_set", json!(["syn", "ack"]), vec![18]),
        ("mode", json!("slow"), vec![1]),
        (
            "mac",
            json!("02:00:5E:00-00:ff"),
            vec![2, 0, 0x5e, 0, 0, 255],
        ),
        ("device", json!("eth0"), 7u32.to_ne_bytes().to_vec()),
        ("target", json!("slow"), 9u32.to_ne_bytes().to_vec()),
        ("port", json!(80), vec![0, 80]),
        ("port", json!("80"), vec![0, 80]),
        ("port", json!("https"), vec![1, 187]),
        (
            "wait",
            json!("200ms"),
            200_000_000u64.to_ne_bytes().to_vec(),
        ),
        (
            "wait",
            json!("1m"),
            60_000_000_000u64.to_ne_bytes().to_vec(),
        ),
        ("raw", json!("1e 0c:00"), vec![0x1e, 0x0c, 0, 0, 0, 0, 0, 0]),
        ("some", json!(80), vec![0, 80, 0, 0, 0, 0]),
        ("some", json!([80, "https"]), vec![0, 80, 1, 187, 0, 0]),
    ];
    for (name, value, bytes) in rows {
        let name_and_value = format!("{name}: {value}");
        if name == "window" {
            let packed = pack(json!({ "window": value })).unwrap();
            assert_eq!(packed.bytes[..2], bytes);
            assert_eq!(packed.element, None);
            continue;
        }
        assert_eq!(packed(name, value).unwrap(), bytes, "{name_and_value}");
    }
    let range = |value| packed("ports", value).unwrap();
    let ends = |first: u16, last: u16| [first.to_ne_bytes(), last.to_ne_bytes()].concat();
    assert_eq!(range(json!("8000-8999")), ends(8000, 8999));
    assert_eq!(range(json!(22)), ends(22, 22));
    assert_eq!(range(json!("http-alt")), ends(8080, 8080));
}

#[test]
fn packs_addresses() {
    let mapped = [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 10, 0, 0, 1];
    assert_eq!(packed("local", json!("10.0.0.1")).unwrap(), mapped);
    let six = packed("local", json!("2001:db8::1")).unwrap();
    assert_eq!((six[0], six[1], six[15]), (0x20, 0x01, 1));
    let length = |text: &str| {
        let bytes = packed("net", json!(text)).unwrap();
        u32::from_ne_bytes(bytes[..4].try_into().unwrap())
    };
    assert_eq!(length("10.0.0.0/8"), 104);
    assert_eq!(length("0.0.0.0/0"), 96);
    assert_eq!(length("10.0.0.1"), 128);
    assert_eq!(length("2001:db8::/32"), 32);
    assert_eq!(length("::/0"), 0);
}

#[test]
fn defaults_and_lengths_are_packed() {
    let packed = pack(json!({ "window": 1, "action": "everything", "raw": "0102",
        "some": [1, 2, 3] }))
    .unwrap();
    let at = |name: &str| params().field(name).unwrap();
    assert_eq!(packed.bytes.len(), params().size);
    assert_eq!(packed.bytes[at("ttl").offset], 32);
    assert_eq!(packed.bytes[at("raw").array.unwrap().length_offset], 2);
    let length = at("some").array.unwrap().length_offset;
    assert_eq!(packed.bytes[length..length + 2], 3u16.to_ne_bytes());
}

#[test]
fn refuses_values() {
    refused(
        "ttl",
        json!(65),
        &["the number 65", "from 1 to 64", "hops left"],
    );
    refused("ttl", json!(0), &["from 1 to 64"]);
    refused("ttl", json!("8"), &["the string \"8\""]);
    refused("mark", json!(-1), &["-1", "0 to 4294967295"]);
    refused("mark", json!(1.5), &["1.5"]);
    refused("mark", Value::Null, &["null"]);
    refused("big", json!([1]), &["the list [1]"]);
    refused("fast", json!(1), &["true or false"]);
    refused(
        "kind",
        json!("mptpc"),
        &["did you mean \"mptcp\"", "none, mss, mptcp"],
    );
    refused("kind", json!(256), &["from 0 to 255"]);
    refused("mode", json!(1), &["one of fast, slow"]);
    refused("flags_set", json!([]), &["one or a list of fin"]);
    refused("flags_set", json!(["syn", 3]), &["the number 3"]);
    refused("local", json!("10.0.0"), &["an IPv4 or IPv6 address"]);
    refused("local", json!("::"), &["leave \"local\" out"]);
    refused(
        "net",
        json!("10.1.2.3/8"),
        &["host bits", "write \"10.0.0.0/8\""],
    );
    refused("net", json!("2001:db8::1/32"), &["write \"2001:db8::/32\""]);
    refused("net", json!("10.0.0.0/33"), &["prefix"]);
    refused("net", json!("10.0.0.0/+8"), &["prefix"]);
    refused("mac", json!("02:00:00:00:00"), &["MAC"]);
    refused("mac", json!("02:00:00:00:00:+1"), &["MAC"]);
    refused("mac", json!("02:00:00:00:00:01:02"), &["MAC"]);
    refused("device", json!("eth9"), &["\"eth9\": no such device"]);
    refused("device", json!(7), &["name of a network device"]);
    refused("target", json!("fast"), &["no such chain"]);
    refused("port", json!(0), &["1 to 65535"]);
    refused("port", json!(65536), &["1 to 65535"]);
    refused("port", json!("gopherd"), &["no service known here"]);
    refused("ports", json!("9-8"), &["LO-HI"]);
    refused("ports", json!("0-8"), &["LO-HI"]);
    refused("ports", json!("1-70000"), &["LO-HI"]);
    refused("wait", json!("1"), &["from 1us to 1m"]);
    refused("wait", json!("2m"), &["from 1us to 1m"]);
    refused("wait", json!("99999999999999h"), &["from 1us to 1m"]);
    refused("wait", json!("5 s"), &["duration"]);
    refused("raw", json!("1e0"), &["hexadecimal", "at most 8 bytes"]);
    refused("raw", json!("010203040506070809"), &["9 bytes"]);
    refused("raw", json!(""), &["hexadecimal"]);
    refused("raw", json!("é1"), &["hexadecimal"]);
    refused("some", json!([1, 2, 3, 4]), &["a list of 4", "at most 3"]);
    refused("some", json!([]), &["a list of 0"]);
    refused("some", json!([1, 0]), &["$.a.some[1]", "the number 0"]);
    refused("mark", json!("x".repeat(1000)), &["xxx..."]);
}

#[test]
fn refuses_keys() {
    let invalid = pack(json!({ "windw": 1 })).unwrap_err();
    assert_eq!(invalid.path, "$.a");
    assert_eq!(
        invalid.found,
        "unknown key \"windw\" (did you mean \"window\"?)"
    );
    assert!(invalid.expected.contains("window, ttl") && invalid.expected.ends_with(", action"));
    let invalid = pack(json!({})).unwrap_err();
    assert_eq!((&*invalid.path, &*invalid.found), ("$.a.window", "nothing"));
    assert!(invalid.advice.contains("required"));
}

#[test]
fn takes_one_member_from_the_element() {
    let from = json!({ "from": "element" });
    let element = |name: &str| {
        let packed = pack(json!({ "window": 1, name: from })).unwrap();
        packed.element.unwrap()
    };
    let ttl = element("ttl");
    assert_eq!((ttl.min, ttl.max, ttl.size), (1, 64, 1));
    assert_eq!(ttl.offset, params().field("ttl").unwrap().offset);
    assert!(element("token").big_endian && !element("mark").big_endian);
    assert!(element("target").is_chain && !element("device").is_chain);
    assert_eq!((element("fast").max, element("device").min), (1, 1));
    assert_eq!((element("mode").min, element("mode").max), (0, 1));
    assert_eq!(
        (element("flags_set").min, element("flags_set").max),
        (0, 23)
    );
    let window = pack(json!({ "window": from })).unwrap();
    assert_eq!(window.element.unwrap().offset, 0);

    refused("local", from.clone(), &["an element carries one number"]);
    refused("some", from.clone(), &["an element carries one number"]);
    refused(
        "ttl",
        json!({ "from": "set" }),
        &["{\"from\": \"element\"}"],
    );
    refused(
        "ttl",
        json!({ "from": "element", "x": 1 }),
        &["{\"from\": \"element\"}"],
    );
    let invalid = pack(json!({ "window": from, "ttl": from })).unwrap_err();
    assert!(invalid.expected.contains("at most one"), "{invalid}");
    let values = object(json!({ "window": from }));
    let invalid = params()
        .pack(&values, "$.a", &[], &TestNames, false)
        .unwrap_err();
    assert!(invalid.found.contains("only an action"), "{invalid}");
}

#[test]
fn unpacks_what_it_packed() {
    let value = json!({
        "window": 1460, "ttl": 9, "fast": true, "mark": 77, "big": u64::MAX, "token": 5,
        "key64": 6, "kind": "mss", "flags_set": ["syn", "ack"], "mode": "slow",
        "port_count": 513, "local": "10.0.0.1", "net": "10.0.0.0/8",
        "mac": "02:00:5e:00:00:ff", "device": "eth0", "target": "slow", "port": 443,
        "ports": "8000-8999", "wait": "1500ms", "raw": "1e0c0001", "some": [80, 443],
        "header_len": 3
    });
    let bytes = pack(value.clone()).unwrap().bytes;
    let back = Value::Object(params().unpack(&bytes, &TestNames));
    assert_eq!(back, value);
    assert_eq!(pack(back).unwrap().bytes, bytes);

    let least = pack(json!({ "window": 1 })).unwrap().bytes;
    let back = params().unpack(&least, &TestNames);
    assert_eq!(Value::Object(back), json!({ "window": 1, "ttl": 32 }));

    let six = object(json!({ "local": "2001:db8::1", "remote": "2001:db8::2" }));
    let bytes = key("flow")
        .pack(&six, "$", &[], &TestNames, false)
        .unwrap()
        .bytes;
    assert_eq!(key("flow").unpack(&bytes, &TestNames), six);
    for text in [
        "10.0.0.0/8",
        "0.0.0.0/0",
        "::/0",
        "2001:db8::/32",
        "::1/128",
    ] {
        let one = object(json!({ "prefix": text }));
        let bytes = key("prefix")
            .pack(&one, "$", &[], &TestNames, false)
            .unwrap()
            .bytes;
        assert_eq!(key("prefix").unpack(&bytes, &TestNames), one);
    }
}

#[test]
fn unpacks_what_has_no_name() {
    let mut bytes = vec![0xff; params().size];
    let at = |name: &str| params().field(name).unwrap().offset;
    bytes[at("device")..][..4].copy_from_slice(&8u32.to_ne_bytes());
    bytes[at("mode")] = 9;
    let back = params().unpack(&bytes, &TestNames);
    assert_eq!(back["device"], json!(8));
    assert_eq!(back["mode"], json!(9));
    assert_eq!(back["flags_set"], json!(["fin", "syn", "rst", "ack", 232]));
    assert_eq!(
        back["some"].as_array().unwrap().len(),
        3,
        "a length past the array is cut"
    );
    assert!(params().unpack(&[], &TestNames).contains_key("window"));
}

#[test]
fn reads_the_compact_form() {
    let flow = |text: &str| key("flow").parse_compact(text).map(Value::Object);
    assert_eq!(
        flow("local=10.0.0.1, local_port=80,arg=5").unwrap(),
        json!({ "local": "10.0.0.1", "local_port": 80, "arg": 5 })
    );
    assert_eq!(
        flow("local_port=https,chain=5").unwrap(),
        json!({ "local_port": "https", "chain": "5" })
    );
    let prefix = |text: &str| key("prefix").parse_compact(text).map(Value::Object);
    let bare = json!({ "prefix": "10.0.0.0/8", "arg": 5 });
    assert_eq!(prefix("10.0.0.0/8,arg=5").unwrap(), bare);
    assert_eq!(prefix("prefix=10.0.0.0/8,arg=5").unwrap(), bare);
    let all = |text: &str| params().parse_compact(text).map(Value::Object);
    assert_eq!(
        all("7,flags_set=syn+ack,some=80+https,raw=10,wait=5,fast=true,ports=1-2").unwrap(),
        json!({ "window": 7, "flags_set": ["syn", "ack"], "some": [80, "https"], "raw": "10",
            "wait": "5", "fast": true, "ports": "1-2" })
    );
    assert!(
        flow("10.0.0.1")
            .unwrap_err()
            .expected
            .contains("local, remote")
    );
    assert!(flow("").unwrap_err().found.contains("empty"));
    assert!(prefix("arg=1,10.0.0.0/8").is_err());
    assert!(flow("local=1,local=2").unwrap_err().found.contains("twice"));
}

#[test]
fn schema_describes_members() {
    let schema = params().schema();
    assert_eq!(schema["required"], json!(["window"]));
    let of = |name: &str| schema["properties"][name].clone();
    assert_eq!(
        of("ttl"),
        json!({ "description": "hops left", "type": "integer", "minimum": 1, "maximum": 64,
            "default": 32 })
    );
    assert_eq!(of("mode")["enum"], json!(["fast", "slow"]));
    assert_eq!(of("some")["anyOf"][1]["maxItems"], json!(3));
    assert_eq!(of("kind")["anyOf"][1]["maximum"], json!(255));
    assert_eq!(of("raw")["type"], json!("string"));
    assert_eq!(of("local")["description"], json!("local address"));
    assert_eq!(of("sure")["const"], json!(true));
    let action = params().schema_of_action();
    let of = |name: &str| action["properties"][name].clone();
    assert_eq!(
        of("ttl")["anyOf"][1]["properties"]["from"]["const"],
        json!("element")
    );
    assert_eq!(of("ttl")["default"], json!(32));
    assert!(of("local").get("anyOf").is_none());
}

#[test]
fn prints_within_100_columns() {
    let long = "word ".repeat(60);
    let source = FLOW
        .replace("matches a flow of a set", &long)
        .replace("local address", &long);
    let object: &'static [u8] = compile(&source).leak();
    let flow = EmbeddedPolicy {
        name: "flow",
        xdp: object,
        tc: object,
    };
    let registry = Registry::new(&[flow]).unwrap();
    let pages = [
        policies_table(&registry),
        policies_table(policies()),
        policy_page(registry.selector("flow").unwrap()),
        policy_page(policies().selector("prefix").unwrap()),
        policy_page(policies().action("everything").unwrap()),
    ];
    for page in pages {
        println!("{page}");
        for line in page.lines() {
            assert!(line.chars().count() <= 100, "{line}");
            assert_eq!(line, line.trim_end());
        }
    }
}

#[test]
fn table_and_page_name_everything() {
    let table = policies_table(policies());
    assert!(
        table.starts_with("NAME        KIND      HOOKS          WHAT IT DOES\n"),
        "{table}"
    );
    assert!(table.contains("flow        selector  xdp,tc-egress  matches a flow of a set\n"));
    assert!(table.contains("everything  action    all            has every type\n"));
    let page = policy_page(policies().action("everything").unwrap());
    for field in &params().fields {
        assert!(
            page.contains(&field.name) && page.contains(&field.doc),
            "{}",
            field.name
        );
    }
    assert!(page.contains("must be the last action"));
    assert!(
        page.contains("{ \"action\": \"everything\", \"window\": 1 }"),
        "{page}"
    );
    let page = policy_page(policies().selector("flow").unwrap());
    assert!(
        page.contains("\"set\": \"NAME\"") && page.contains("\"keys\": [{ \"local\""),
        "{page}"
    );
}

#[test]
fn examples_are_accepted() {
    let names = |field: &Field| match field.ty {
        FieldType::Chain => json!("slow"),
        FieldType::Token => json!("5e1cb2d0"),
        _ => field.example(),
    };
    let all: Map<String, Value> = params()
        .fields
        .iter()
        .map(|field| (field.name.clone(), names(field)))
        .collect();
    pack(Value::Object(all)).unwrap();
}

#[test]
fn json_form_is_stable() {
    let json = policies_json(policies());
    let list = json["policies"].as_array().unwrap();
    let names: Vec<&Value> = list.iter().map(|policy| &policy["name"]).collect();
    assert_eq!(names, ["flow", "prefix", "everything"]);
    assert_eq!(
        list[0],
        json!({
            "name": "flow", "kind": "selector", "doc": "matches a flow of a set",
            "terminal": false, "once": false, "hooks": ["xdp", "tc-egress"],
            "parameters": [{
                "name": "any_port", "type": "bool", "values": "true or false",
                "doc": "ignore the ports of the key", "required": false, "default": null,
                "from_element": false
            }],
            "set": { "kind": "flow", "key": list[0]["set"]["key"] }
        })
    );
    let ttl = &list[2]["parameters"][1];
    assert_eq!((&ttl["minimum"], &ttl["maximum"]), (&json!(1), &json!(64)));
    assert_eq!(
        (&ttl["default"], &ttl["from_element"]),
        (&json!(32), &json!(true))
    );
    assert_eq!(list[1]["set"]["key"][0]["type"], json!("prefix"));
}
