// SPDX-License-Identifier: MIT OR Apache-2.0
//! Actions on TCP options: `strip_option`, `insert_option`, `set_mss`.

use policy_chain::hook::Hook;
use policy_chain::replay::Verdict;
use serde_json::json;

use crate::bench::{Row, act, act_in, file, gives, leaves};
use crate::frames::*;

const MSS: u8 = 2;
const WINDOW_SCALE: u8 = 3;
const SACK_PERMITTED: u8 = 4;
const SACK: u8 = 5;
const TIMESTAMPS: u8 = 8;
const MPTCP: u8 = 30;

const DSS: u8 = 0x20;
const ADD_ADDR: u8 = 0x30;

/// Kinds by the names chain files give them, with a length each can have.
const KINDS: [(&str, u8, u8); 10] = [
    ("mss", MSS, 4),
    ("window_scale", WINDOW_SCALE, 3),
    ("sack_permitted", SACK_PERMITTED, 2),
    ("sack", SACK, 34),
    ("timestamps", TIMESTAMPS, 10),
    ("md5", 19, 18),
    ("user_timeout", 28, 4),
    ("ao", 29, 16),
    ("mptcp", MPTCP, 20),
    ("fast_open", 34, 18),
];

const SUBTYPES: [(&str, u8); 9] = [
    ("mp_capable", 0),
    ("mp_join", 1),
    ("dss", 2),
    ("add_addr", 3),
    ("remove_addr", 4),
    ("mp_prio", 5),
    ("mp_fail", 6),
    ("mp_fastclose", 7),
    ("mp_tcprst", 8),
];

fn nops(count: u8) -> Vec<u8> {
    vec![1; count.into()]
}

/// Every kind of packet an action must find its option in.
fn bases() -> Vec<(&'static str, Frame)> {
    vec![
        ("IPv4", v4()),
        ("IPv4, payload", v4().payload(b"hello world, odd")),
        ("IPv4, padding", v4().padded()),
        ("IPv6", v6()),
        ("IPv6, odd payload", v6().payload(b"xyz")),
        ("802.1Q", v4().tags(&[0x8100])),
        ("QinQ, IPv6", v6().tags(&[0x88a8, 0x8100])),
        ("IP options", v4().ip_options(&[7, 7, 4, 0, 0, 0, 0, 0])),
        (
            "extension headers",
            v6().extension(HOP_BY_HOP, &[0; 8])
                .extension(DESTINATION, &[0; 8]),
        ),
        ("a long payload", v4().payload(&[0xa5; 3001])),
    ]
}

/// The same change in every kind of packet.
fn everywhere(what: &str, before: &[u8], after: &[u8], flags: u16) -> Vec<Row> {
    let fragment = v4().fragment(MORE_FRAGMENTS).payload(&[7; 24]);
    let bases = bases().into_iter().chain([("first fragment", fragment)]);
    changes(
        what,
        before,
        after,
        bases.map(|(base, frame)| (base, frame.flags(flags))),
    )
}

/// Those that cannot grow: what is inserted has to stand in the place of NOPs.
fn loaded() -> Vec<(&'static str, Frame)> {
    let mut bases = bases();
    bases.retain(|(_, frame)| !frame.payload.is_empty());
    bases
}

/// The same insertion in every packet that cannot grow.
fn in_place(what: &str, before: &[u8], after: &[u8], flags: u16) -> Vec<Row> {
    let fragment = v4().fragment(MORE_FRAGMENTS).payload(&[7; 24]);
    let bare_fragment = v4().fragment(MORE_FRAGMENTS);
    let fragments = [
        ("first fragment", fragment),
        ("first fragment, header only", bare_fragment),
    ];
    changes(
        what,
        before,
        after,
        loaded()
            .into_iter()
            .chain(fragments)
            .map(|(base, frame)| (base, frame.flags(flags))),
    )
}

/// As XDP gets packets from a veth: the checksum is a seed, and stays one.
fn seeds(what: &str, before: &[u8], after: &[u8], flags: u16) -> Vec<Row> {
    let seeded =
        |(base, frame): (&'static str, Frame)| (base, frame.flags(flags).check(Check::Seed));
    changes(what, before, after, bases().into_iter().map(seeded))
}

fn changes(
    what: &str,
    before: &[u8],
    after: &[u8],
    bases: impl Iterator<Item = (&'static str, Frame)>,
) -> Vec<Row> {
    bases
        .map(|(base, frame)| {
            gives(
                format!("{what}, {base}"),
                &frame.clone().options(before),
                &frame.options(after),
            )
        })
        .collect()
}

/// XDP has what is over a page in fragments.
#[test]
fn packets_of_many_pages() {
    let add_addr = option(MPTCP, 8, ADD_ADDR);
    for length in [3900, 4097, 9001, 60001] {
        let payload: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        let chain = file(json!({ "actions": [
            { "action": "strip_option", "kind": "mptcp" },
            { "action": "insert_option", "kind": 253, "data": "aabb" },
            { "action": "set_window", "raw": true, "bytes": 9 } ] }));
        let mut rows = Vec::new();
        for check in [Check::Complete, Check::Seed] {
            for (version, frame) in both() {
                let frame = frame.check(check).payload(&payload);
                let after = words(&[INSERT, &nops(4)]);
                rows.push(gives(
                    format!("{version}, {length} bytes"),
                    &frame.clone().options(&words(&[&add_addr])),
                    &frame.options(&after).window(9),
                ));
            }
        }
        act_in(chain, &[Hook::Xdp], &rows);
    }
}

#[test]
fn strip_every_kind() {
    for (name, kind, length) in KINDS {
        let present = option(kind, length, 0x55);
        let before = words(&[&present]);
        let after = nops(before.len() as u8);
        let mut rows = everywhere("alone", &before, &after, ACK);
        rows.push(leaves("no options", &v4(), "option_absent"));
        rows.push(leaves(
            "only others",
            &v4().options(&words(&[&[77, 3, 9]])),
            "option_absent",
        ));
        rows.push(leaves("UDP", &v4().protocol(UDP), "not_tcp"));
        act(json!({ "action": "strip_option", "kind": name }), &rows);
        act(json!({ "action": "strip_option", "kind": kind }), &rows);
        let seeded = seeds("alone", &before, &after, ACK);
        let chain = file(json!({ "actions": [{ "action": "strip_option", "kind": name }] }));
        act_in(chain, &[Hook::Xdp], &seeded);
    }
}

#[test]
fn strip_subtypes() {
    for (name, number) in SUBTYPES {
        let mut rows = Vec::new();
        for (other, first) in SUBTYPES {
            let present = words(&[&option(MPTCP, 12, first << 4 | 1)]);
            if first == number {
                rows.extend(everywhere(other, &present, &nops(12), ACK));
            } else {
                rows.push(leaves(other, &v6().options(&present), "option_absent"));
            }
        }
        rows.push(leaves(
            "without a subtype",
            &v4().options(&words(&[&[MPTCP, 2]])),
            "option_absent",
        ));
        // announcements are of mptcp.rs otherwise
        for action in [
            json!({ "action": "strip_option", "kind": "mptcp", "subtype": name, "unsafe": true }),
            json!({ "action": "strip_option", "kind": 30, "subtype": number, "unsafe": true }),
        ] {
            let mut action = action;
            action["mode"] = "nop".into();
            act(action.clone(), &rows);
            if name != "add_addr" {
                action["mode"] = "auto".into();
                act(action, &rows);
            }
        }
    }
}

#[test]
fn strip_several_and_at_any_offset() {
    let add_addr = option(MPTCP, 8, ADD_ADDR);
    let long = option(MPTCP, 28, ADD_ADDR);
    let dss = option(MPTCP, 8, DSS);
    let timestamps = option(TIMESTAMPS, 10, 1);
    let mut rows = Vec::new();
    let mut change = |what: &str, before: &[&[u8]], after: &[&[u8]]| {
        rows.extend(everywhere(what, &words(before), &words(after), ACK));
    };
    change("two", &[&add_addr, &add_addr], &[&nops(16)]);
    change(
        "four",
        &[&add_addr, &dss, &add_addr, &add_addr, &add_addr],
        &[&nops(8), &dss, &nops(24)],
    );
    change("behind DSS", &[&dss, &add_addr], &[&dss, &nops(8)]);
    change("before DSS", &[&add_addr, &dss], &[&nops(8), &dss]);
    change("the IPv6 form", &[&long], &[&nops(28)]);
    change(
        "the IPv6 form with timestamps",
        &[&timestamps, &[1, 1], &long],
        &[&timestamps, &nops(30)],
    );
    change("odd offset", &[&[1], &add_addr], &[&nops(9)]);
    change(
        "odd offset and length",
        &[&[3, 3, 7], &option(MPTCP, 9, ADD_ADDR)],
        &[&[3, 3, 7], &nops(9)],
    );
    change(
        "two at odd offsets",
        &[&[1], &add_addr, &[3, 3, 7], &dss, &[1], &add_addr],
        &[&nops(9), &[3, 3, 7], &dss, &nops(9)],
    );
    change("last byte of 40", &[&nops(32), &add_addr], &[&nops(40)]);
    change("all 40", &[&option(MPTCP, 40, ADD_ADDR)], &[&nops(40)]);
    change(
        "twenty NOPs between",
        &[&add_addr, &nops(20), &add_addr],
        &[&nops(36)],
    );
    let before_end = [&add_addr[..], &[0], &add_addr, &[0, 0, 0]].concat();
    let after_end = [&nops(8)[..], &[0], &add_addr, &[0, 0, 0]].concat();
    rows.extend(everywhere(
        "nothing behind EOL",
        &before_end,
        &after_end,
        ACK,
    ));
    rows.push(leaves(
        "only behind EOL",
        &v4().options(&[&[0][..], &add_addr, &[0, 0, 0]].concat()),
        "option_absent",
    ));
    for (what, options) in [
        ("length 0", &[MPTCP, 0, 0x30, 0][..]),
        ("length 1", &[MPTCP, 1, 0x30, 0]),
        ("length past the end", &[1, 1, MPTCP, 3]),
        ("no length", &[1, 1, 1, MPTCP]),
        (
            "a good one, then length 0",
            &[MPTCP, 3, 0x30, 9, 0, 1, 1, 1],
        ),
        (
            "a good one, then one past the end",
            &[MPTCP, 3, 0x30, 9, 6, 1, 1, 1],
        ),
    ] {
        rows.push(leaves(
            what,
            &v4().options(options).payload(&[0x30; 40]),
            "bad_option",
        ));
        rows.push(leaves(
            what,
            &v6().options(options).payload(&[0x30; 40]),
            "bad_option",
        ));
    }
    rows.push(leaves(
        "later fragment",
        &v4().options(&words(&[&add_addr])).fragment(2),
        "fragment",
    ));
    act(
        json!({ "action": "strip_option", "kind": "mptcp", "subtype": "add_addr", "mode": "nop" }),
        &rows,
    );
    let any = [
        everywhere(
            "any subtype",
            &words(&[&dss, &timestamps, &add_addr]),
            &words(&[&nops(8), &timestamps, &nops(8)]),
            ACK,
        ),
        everywhere("without a subtype", &words(&[&[MPTCP, 2]]), &nops(4), ACK),
    ];
    act(
        json!({ "action": "strip_option", "kind": "mptcp", "unsafe": true }),
        &any.concat(),
    );
}

fn remove() -> serde_json::Value {
    json!({ "action": "strip_option", "kind": "mptcp", "subtype": "add_addr", "mode": "remove" })
}

/// Option spaces before and after ADD_ADDR is taken out.
fn removals() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let add_addr = |length| option(MPTCP, length, ADD_ADDR);
    let dss = option(MPTCP, 12, DSS);
    let timestamps = [&[1, 1][..], &option(TIMESTAMPS, 10, 1)].concat();
    vec![
        ("the only one", add_addr(8), vec![]),
        (
            "behind others",
            [&timestamps[..], &dss, &add_addr(16)].concat(),
            [&timestamps[..], &dss].concat(),
        ),
        (
            "before others",
            [&add_addr(8)[..], &timestamps].concat(),
            timestamps.clone(),
        ),
        (
            "several",
            [&add_addr(8)[..], &timestamps, &add_addr(16)].concat(),
            timestamps.clone(),
        ),
        ("all 40 bytes", add_addr(40), vec![]),
        (
            "an odd offset",
            words(&[&[3, 3, 7], &add_addr(8)]),
            words(&[&[3, 3, 7]]),
        ),
        (
            "NOPs stay but at the end",
            [&[1, 3, 3, 7][..], &add_addr(8), &nops(4)].concat(),
            vec![1, 3, 3, 7],
        ),
        (
            "what EOL ends goes too",
            [&[3, 3, 7][..], &add_addr(8), &[0, 9, 9, 9, 9]].concat(),
            words(&[&[3, 3, 7]]),
        ),
        (
            "too short to shrink",
            words(&[&[MPTCP, 3, ADD_ADDR]]),
            vec![],
        ),
        (
            "less than a word",
            words(&[&[MPTCP, 3, ADD_ADDR], &[3, 3, 7]]),
            words(&[&[3, 3, 7], &[1]]),
        ),
    ]
}

#[test]
fn remove_shrinks_the_header() {
    let chain = file(json!({ "actions": [remove()] }));
    let mut rows = Vec::new();
    for (what, before, after) in removals() {
        // a frame keeps the length of the shortest, with what stood there
        let unpadded = |(_, frame): &(&str, Frame)| {
            frame.trailer.is_empty() && frame.clone().options(&after).build().len() >= ETHERNET_MIN
        };
        let loaded = bases().into_iter().filter(unpadded);
        rows.extend(changes(what, &before, &after, loaded));
    }
    for length in [3900, 9001, 60001] {
        let payload: Vec<u8> = (0..length).map(|at| (at % 251) as u8).collect();
        for (version, frame) in both() {
            rows.push(gives(
                format!("{length} bytes, {version}"),
                &frame
                    .clone()
                    .options(&option(MPTCP, 8, ADD_ADDR))
                    .payload(&payload),
                &frame.payload(&payload),
            ));
        }
    }
    act_in(chain, &[Hook::Xdp], &rows);
}

/// A device completes a partial checksum where the header stood, so the header must not move; that
/// of a segment without payload does not.
#[test]
fn remove_from_a_seed() {
    let chain = file(json!({ "actions": [remove()] }));
    let mut rows = Vec::new();
    for (what, before, after) in removals() {
        for (base, frame) in [
            ("IPv6", v6()),
            ("extension header", v6().extension(DESTINATION, &[0; 8])),
        ] {
            let frame = frame.check(Check::Seed);
            rows.extend(changes(
                what,
                &before,
                &after,
                [(base, frame.clone())].into_iter(),
            ));
            let loaded = frame.payload(b"data").options(&before);
            if before.len() > after.len() {
                rows.push(leaves(what, &loaded, "checksum_partial"));
            }
        }
    }
    act_in(chain, &[Hook::Xdp], &rows);
}

#[test]
fn remove_keeps_a_frame_from_being_too_short() {
    let add_addr = option(MPTCP, 16, ADD_ADDR);
    let chain = file(json!({ "actions": [remove()] }));
    // 70 bytes become 54, and 60 the frame: what a device adds up for a checksum must not change
    let mut short = v4();
    short.trailer = vec![0; 6];
    let mut padded = v4().options(&option(MPTCP, 4, ADD_ADDR)).padded();
    padded.trailer = vec![0xee; 2];
    let mut shrunk = v4();
    shrunk.trailer = [&[0; 4][..], &[0xee; 2]].concat();
    let mut long = v6().options(&add_addr);
    long.trailer = vec![0xee; 9];
    let rows = [
        gives("no padding", &v4().options(&add_addr), &short),
        gives("padding", &padded, &shrunk),
        gives("a trailer that is no padding", &long, &v6()),
    ];
    act_in(chain, &[Hook::Xdp], &rows);
}

#[test]
fn remove_gives_up() {
    let add_addr = option(MPTCP, 8, ADD_ADDR);
    let rows = [
        leaves("absent", &v4(), "option_absent"),
        leaves(
            "malformed",
            &v4().options(&[&add_addr[..], &[3, 1, 1, 1]].concat()),
            "bad_option",
        ),
        leaves(
            "first fragment",
            &v4()
                .options(&add_addr)
                .fragment(MORE_FRAGMENTS)
                .payload(&[7; 24]),
            "fragment",
        ),
        leaves(
            "later fragment",
            &v4().options(&add_addr).fragment(3),
            "fragment",
        ),
        leaves("UDP", &v4().protocol(UDP), "not_tcp"),
    ];
    act_in(file(json!({ "actions": [remove()] })), &[Hook::Xdp], &rows);
}

/// 253 is for experiments (RFC 4727).
const INSERT: &[u8] = &[253, 4, 0xaa, 0xbb];

fn insert() -> serde_json::Value {
    json!({ "action": "insert_option", "kind": 253, "data": "aabb" })
}

/// Option spaces before and after an insertion that takes 4 bytes.
fn insertions() -> Vec<(&'static str, Vec<u8>, Vec<u8>)> {
    let timestamps = option(TIMESTAMPS, 10, 1);
    let dss = option(MPTCP, 12, DSS);
    let scale = [3, 3, 7];
    vec![
        ("no options", vec![], INSERT.to_vec()),
        (
            "NOPs before timestamps",
            [&[1, 1][..], &timestamps].concat(),
            [&[1, 1][..], &timestamps, INSERT].concat(),
        ),
        (
            "timestamps and DSS",
            words(&[&timestamps, &dss]),
            words(&[&timestamps, &dss, INSERT]),
        ),
        ("an odd end", words(&[&scale]), words(&[&scale, INSERT])),
        (
            "NOPs go where 40 bytes do not suffice",
            [&nops(4)[..], &option(MPTCP, 36, DSS)].concat(),
            words(&[&option(MPTCP, 36, DSS), INSERT]),
        ),
        (
            "exact fit",
            words(&[&option(MPTCP, 36, DSS)]),
            words(&[&option(MPTCP, 36, DSS), INSERT]),
        ),
        (
            "behind EOL",
            [&scale[..], &[0, 9, 9, 9, 9, 9]].concat()[..8].to_vec(),
            words(&[&scale, INSERT]),
        ),
    ]
}

#[test]
fn insert_into_a_bare_segment() {
    let mut rows = Vec::new();
    for (what, before, after) in insertions() {
        for (base, frame) in [
            ("IPv4", v4()),
            ("IPv6", v6()),
            ("802.1Q", v4().tags(&[0x8100])),
            ("QinQ, IPv6", v6().tags(&[0x88a8, 0x8100])),
            ("IP options", v4().ip_options(&[1; 40])),
            ("extension header", v6().extension(DESTINATION, &[0; 8])),
            ("FIN", v4().flags(FIN | ACK)),
            (
                "odd addresses",
                v4().between([255, 255, 255, 254], [1, 2, 3, 5]),
            ),
        ] {
            let what = format!("{what}, {base}");
            rows.push(gives(
                what,
                &frame.clone().options(&before),
                &frame.options(&after),
            ));
        }
        let mut padded = v4().options(&before).padded();
        let input = padded.clone();
        let grown = after.len() - before.len();
        padded.options = after.clone();
        padded
            .trailer
            .truncate(padded.trailer.len().saturating_sub(grown));
        rows.push(gives(format!("{what}, padding"), &input, &padded));
    }
    act(insert(), &rows);
}

#[test]
fn insert_grows_a_seed() {
    let bare = bases()
        .into_iter()
        .filter(|(_, frame)| frame.payload.is_empty() && frame.trailer.is_empty())
        .map(|(base, frame)| (base, frame.check(Check::Seed)));
    let rows: Vec<Row> = insertions()
        .iter()
        .flat_map(|(what, before, after)| changes(what, before, after, bare.clone()))
        .collect();
    act_in(file(json!({ "actions": [insert()] })), &[Hook::Xdp], &rows);
}

#[test]
fn insert_in_place_of_nops() {
    let timestamps = option(TIMESTAMPS, 10, 1);
    let dss = option(MPTCP, 18, DSS);
    let mut rows = in_place(
        "NOPs around",
        &[&[1, 1][..], &timestamps, &[1, 1], &dss].concat(),
        &words(&[&timestamps, &dss, INSERT]),
        ACK,
    );
    rows.extend(in_place(
        "all NOPs",
        &nops(12),
        &words(&[INSERT, &nops(8)]),
        ACK,
    ));
    rows.extend(in_place("just enough", &nops(4), INSERT, PSH | ACK));
    rows.extend(in_place(
        "in place of EOL",
        &[&timestamps[..], &[0, 0, 0, 0, 0, 0]].concat(),
        &words(&[&timestamps, INSERT]),
        ACK,
    ));
    rows.push(leaves(
        "one NOP short",
        &v4()
            .options(&words(&[&[3, 3, 7], &timestamps, &[1, 1, 1]]))
            .payload(b"data"),
        "no_room",
    ));
    for (version, frame) in both() {
        rows.push(leaves(
            format!("payload and no options, {version}"),
            &frame.clone().payload(b"d"),
            "no_room",
        ));
        rows.push(leaves(
            format!("full, {version}"),
            &frame.clone().options(&words(&[&option(MPTCP, 37, DSS)])),
            "no_room",
        ));
        rows.push(leaves(
            format!("40 of 40, {version}"),
            &frame.clone().options(&option(MPTCP, 40, DSS)),
            "no_room",
        ));
        rows.push(leaves(
            format!("malformed, {version}"),
            &frame.clone().options(&[3, 1, 1, 1]),
            "bad_option",
        ));
        rows.push(leaves(
            format!("longer than the rest, {version}"),
            &frame.clone().options(&[1, 1, 3, 4]),
            "bad_option",
        ));
        rows.push(leaves(
            format!("there already, {version}"),
            &frame.options(&words(&[&[253, 2]])),
            "option_present",
        ));
    }
    rows.push(leaves(
        "first fragment does not grow",
        &v4().fragment(MORE_FRAGMENTS),
        "no_room",
    ));
    rows.push(leaves("later fragment", &v4().fragment(9), "fragment"));
    rows.push(leaves("UDP", &v6().protocol(UDP), "not_tcp"));
    act(insert(), &rows);
    let seeded = loaded()
        .into_iter()
        .map(|(base, frame)| (base, frame.check(Check::Seed)));
    let seeded = changes("NOPs", &nops(8), &words(&[INSERT, &nops(4)]), seeded);
    act_in(
        file(json!({ "actions": [insert()] })),
        &[Hook::Xdp],
        &seeded,
    );
}

#[test]
fn insert_of_other_lengths() {
    let data: String = (2..40).map(|byte| format!("{byte:02x}")).collect();
    let whole: Vec<u8> = [253, 40].into_iter().chain(2..40).collect();
    act(
        json!({ "action": "insert_option", "kind": 253, "data": data }),
        &[
            gives("all 40 bytes", &v4(), &v4().options(&whole)),
            gives("all 40 bytes, IPv6", &v6(), &v6().options(&whole)),
            gives(
                "for 40 NOPs",
                &v6().options(&nops(40)).payload(b"abc"),
                &v6().options(&whole).payload(b"abc"),
            ),
            leaves(
                "one option more",
                &v4().options(&words(&[&[3, 3, 7]])),
                "no_room",
            ),
        ],
    );
    act(
        json!({ "action": "insert_option", "kind": "sack_permitted" }),
        &[
            gives("no data", &v4(), &v4().options(&words(&[&[4, 2]]))),
            gives(
                "two NOPs",
                &v4().options(&[1, 3, 3, 7, 1, 9, 2, 1]).payload(b"x"),
                &v4().options(&[3, 3, 7, 9, 2, 4, 2, 1]).payload(b"x"),
            ),
            leaves(
                "one NOP",
                &v4().options(&[3, 3, 7, 1]).payload(b"x"),
                "no_room",
            ),
        ],
    );
    act(
        json!({ "action": "insert_option", "kind": 253, "data": "07" }),
        &[
            gives("odd length", &v4(), &v4().options(&[253, 3, 7, 1])),
            gives(
                "odd offset",
                &v4().options(&[3, 3, 7, 1, 1, 1, 1, 1]).payload(b"x"),
                &v4()
                    .options(&words(&[&[3, 3, 7], &[253, 3, 7], &[1, 1]]))
                    .payload(b"x"),
            ),
        ],
    );
    act(
        json!({ "action": "insert_option", "kind": 253, "data": "aabb", "again": true }),
        &[
            gives(
                "again",
                &v4().options(INSERT),
                &v4().options(&[INSERT, INSERT].concat()),
            ),
            gives("first", &v6(), &v6().options(INSERT)),
        ],
    );
}

#[test]
fn set_mss() {
    let syn = |options: &[u8]| v4().flags(SYN).options(options);
    let mss = |high: u8, low: u8| [MSS, 4, high, low];
    let before = words(&[&mss(5, 0xb4), &[3, 3, 7]]);
    let after = words(&[&mss(2, 0x18), &[3, 3, 7]]);
    let odd = |value: [u8; 4]| words(&[&[3, 3, 7], &value]);
    let mut rows = everywhere("SYN", &before, &after, SYN);
    rows.extend(everywhere("SYN, ACK", &before, &after, SYN | ACK));
    rows.extend(everywhere(
        "odd offset",
        &odd(mss(5, 0xb4)),
        &odd(mss(2, 0x18)),
        SYN,
    ));
    rows.extend(everywhere(
        "last of 40",
        &words(&[&nops(36), &mss(0xff, 0xff)]),
        &words(&[&nops(36), &mss(2, 0x18)]),
        SYN,
    ));
    rows.extend([
        leaves("not a SYN", &v4().options(&before), "not_syn"),
        leaves("no option", &syn(&[3, 3, 7, 1]), "option_absent"),
        leaves("no options", &syn(&[]), "option_absent"),
        leaves(
            "behind EOL",
            &syn(&[0, 0, 0, 0, 2, 4, 5, 0xb4]),
            "option_absent",
        ),
        leaves("twice", &syn(&[2, 4, 5, 0xb4, 2, 4, 5, 0xb4]), "bad_option"),
        leaves("of 3 bytes", &syn(&[2, 3, 5, 1]), "bad_option"),
        leaves("of 5 bytes", &syn(&[2, 5, 5, 1, 1, 1, 1, 1]), "bad_option"),
        leaves("past the end", &syn(&[1, 2, 4, 5]), "bad_option"),
        leaves("later fragment", &syn(&before).fragment(3), "fragment"),
        leaves("UDP", &v4().protocol(UDP), "not_tcp"),
    ]);
    let mut clamp = rows.clone();
    clamp.extend([
        leaves("the same", &syn(&mss(2, 0x18)), "not_lower"),
        leaves("lower", &syn(&mss(1, 0)), "not_lower"),
        gives("one above", &syn(&mss(2, 0x19)), &syn(&mss(2, 0x18))),
    ]);
    act(json!({ "action": "set_mss", "bytes": 536 }), &clamp);
    act(
        json!({ "action": "set_mss", "bytes": 536, "mode": "clamp" }),
        &clamp,
    );
    rows.extend([
        gives("the same", &syn(&mss(2, 0x18)), &syn(&mss(2, 0x18))),
        gives("lower", &syn(&mss(1, 0)), &syn(&mss(2, 0x18))),
    ]);
    act(
        json!({ "action": "set_mss", "bytes": 536, "mode": "set" }),
        &rows,
    );
    let chain = file(json!({ "actions": [{ "action": "set_mss", "bytes": 536 }] }));
    act_in(
        chain.clone(),
        &[Hook::Xdp],
        &seeds("SYN", &before, &after, SYN),
    );
    let odd_seeds = seeds("odd", &odd(mss(5, 0xb4)), &odd(mss(2, 0x18)), SYN);
    act_in(chain, &[Hook::Xdp], &odd_seeds);
}

#[test]
fn giving_up_can_end_the_chain() {
    for (on_error, verdict, second) in [
        ("pass", Verdict::Pass, false),
        ("drop", Verdict::Drop, false),
        ("continue", Verdict::Pass, true),
    ] {
        let chain = file(json!({ "actions": [
            { "action": "strip_option", "kind": "mptcp", "on_error": on_error },
            { "action": "set_window", "raw": true, "bytes": 9 } ] }));
        let with = v4().options(&words(&[&[MPTCP, 2]]));
        let mut row = leaves("absent", &v4(), "option_absent");
        if second {
            row = row.output(&v4().window(9));
        }
        let rows = [
            row.verdict(verdict),
            gives("present", &with, &v4().options(&nops(4)).window(9)),
        ];
        act_in(chain, &Hook::ALL, &rows);
    }
}
