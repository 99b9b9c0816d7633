// SPDX-License-Identifier: MIT OR Apache-2.0
//! The tables in `docs/packets.md`: each cell is what the real program did with packets of its row,
//! compared with frames that are built here. `WRITE_DOCS=1` writes them.

mod outcomes;
mod rows;
mod run;

use std::env;
use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;

use policy_chain::hook::{Family, Hook};
use policy_chain::policy::Registry;
use policy_chain::replay::Verdict;
use serde_json::{Value, json};

use crate::bench::with_chains;
use crate::wire::with_wire;
use outcomes::{ADDRESS, ADDRESS_ID, Added, Change, NEW_WINDOW, SCALE};
use rows::{Base, Row, tables};
use run::{At, Cells, load, run_column};

const BEGIN: &str =
    "<!-- Made by `make docs` from tests/packets/table.rs, which runs every cell. -->\n";
const END: &str = "<!-- End of what is made. -->\n";

/// Actions that never look at a packet.
const BLIND: [&str; 4] = ["count", "drop", "goto", "pass"];

/// An action of the catalogue.
struct Column {
    action: &'static str,
    /// What follows its name in the table.
    variant: &'static str,
    parameters: Value,
    change: Change,
    families: &'static [Family],
    learns: Learns,
    /// Where nothing else helps it drops the packet.
    may_drop: bool,
}

/// What an action wants to know of the connection.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Learns {
    Nothing,
    /// The window scales that the ends agreed on.
    Scale,
    /// Its keys, and that both ends take MPTCP for established.
    Mptcp,
}

const BOTH: &[Family] = &[Family::Xdp, Family::Tc];
const XDP: &[Family] = &[Family::Xdp];

fn columns() -> Vec<Column> {
    let column = |action, variant, parameters, change| Column {
        action,
        variant,
        parameters,
        change,
        families: BOTH,
        learns: Learns::Nothing,
        may_drop: false,
    };
    vec![
        Column {
            learns: Learns::Scale,
            ..column(
                "set_window",
                "",
                json!({ "bytes": u32::from(NEW_WINDOW) << SCALE }),
                Change::Window,
            )
        },
        column(
            "set_window",
            "`raw`, `max`",
            json!({ "bytes": NEW_WINDOW, "raw": true, "max": true }),
            Change::Window,
        ),
        column("set_mss", "", json!({ "bytes": 0x218 }), Change::Mss),
        column("strip_option", "", json!({ "kind": "mptcp" }), Change::Nop),
        Column {
            families: XDP,
            ..column(
                "strip_option",
                "`remove` (XDP)",
                json!({ "kind": "mptcp", "mode": "remove" }),
                Change::Remove,
            )
        },
        column(
            "insert_option",
            "",
            json!({ "kind": 253, "data": "aabb" }),
            Change::Insert,
        ),
        column(
            "redirect",
            "",
            json!({ "device": "to" }),
            Change::Send { routed: false },
        ),
        column(
            "redirect",
            "`neighbour`",
            json!({ "device": "to", "neighbour": true }),
            Change::Send { routed: true },
        ),
    ]
}

/// Actions on subflows, which have tables of their own.
fn mptcp_columns() -> Vec<Column> {
    let column = |action, parameters, change| Column {
        action,
        variant: "",
        parameters,
        change,
        families: BOTH,
        learns: Learns::Mptcp,
        may_drop: false,
    };
    let address = Ipv4Addr::from(ADDRESS).to_string();
    vec![
        Column {
            variant: "`add_addr`",
            may_drop: true,
            ..column(
                "strip_option",
                json!({ "kind": "mptcp", "subtype": "add_addr" }),
                Change::Nop,
            )
        },
        column("hold_add_addr", json!({}), Change::Nop),
        column(
            "restore_add_addr",
            json!({ "apart": "0ns" }),
            Change::Add(Added::Held),
        ),
        column(
            "add_subflow",
            json!({ "address": address, "id": ADDRESS_ID, "once": false, "apart": "0ns" }),
            Change::Add(Added::Address),
        ),
        column(
            "remove_addr",
            json!({ "id": ADDRESS_ID, "once": false }),
            Change::Add(Added::Removed),
        ),
        column(
            "mp_prio",
            json!({ "backup": true, "once": false }),
            Change::Add(Added::Prio),
        ),
        column("reset_subflow", json!({}), Change::Reset),
        column("record", json!({}), Change::Note),
        column("learn", json!({ "set": "seen" }), Change::Note),
        column("report", json!({}), Change::Note),
    ]
}

/// One word if it is the same everywhere, else words by the coarsest names that tell.
fn cell(words: &[(At, String)]) -> String {
    if let Some(word) = only(words.iter()) {
        return word.to_owned();
    }
    let mut texts = Vec::new();
    for family in ["XDP", "TC"] {
        let of = |(at, _): &&(At, String)| at.names()[0] == family;
        if let Some(word) = only(words.iter().filter(of)) {
            texts.push(format!("{family}: {word}"));
            continue;
        }
        for name in ["native XDP", "generic XDP", "tc-ingress", "tc-egress"] {
            let named = |(at, _): &&(At, String)| at.names() == [family, name];
            let mut found = words.iter().filter(named).peekable();
            if found.peek().is_some() {
                let word = only(found).unwrap_or_else(|| panic!("one row: {words:?}"));
                texts.push(format!("{name}: {word}"));
            }
        }
    }
    texts.join("; ")
}

/// The word that all of them are, if they are one.
fn only<'a>(mut words: impl Iterator<Item = &'a (At, String)>) -> Option<&'a str> {
    let (_, first) = words.next()?;
    words.all(|(_, word)| word == first).then_some(first)
}

/// Columns that say the same in every row are one.
fn merged<'a>(columns: &[Column], cells: &'a [Cells]) -> Vec<(String, &'a Cells)> {
    let mut merged: Vec<(String, &Cells)> = Vec::new();
    for (column, cells) in columns.iter().zip(cells) {
        let name = format!("`{}` {}", column.action, column.variant);
        let said = |cells: &Cells| -> Vec<(&str, String)> {
            cells.iter().map(|(row, it)| (*row, cell(it))).collect()
        };
        match merged
            .iter_mut()
            .find(|(_, other)| said(other) == said(cells))
        {
            Some((names, _)) => *names += &format!(", {}", name.trim_end()),
            None => merged.push((name.trim_end().to_owned(), cells)),
        }
    }
    merged
}

fn render(prefix: &str, columns: &[Column], cells: &[Cells]) -> String {
    let mut text = String::new();
    let columns = merged(columns, cells);
    for (title, rows) in tables(&Base::of(Change::Window)) {
        text += &format!("\n### {prefix}{title}\n\n| Packet |");
        for (names, _) in &columns {
            text += &format!(" {names} |");
        }
        text += &format!("\n|---|{}\n", "---|".repeat(columns.len()));
        for row in rows {
            text += &format!("| {} |", row.what);
            for (_, cells) in &columns {
                let words = cells.get(row.what).map_or("–".to_owned(), |it| cell(it));
                text += &format!(" {words} |");
            }
            text += "\n";
        }
    }
    text
}

/// Compares the tables with what every action does, or writes them if `make docs` asks for that.
#[test]
fn tables_are_current() {
    let (columns, mptcp) = (columns(), mptcp_columns());
    let (cells, more, failures) = with_wire(|mut wire| {
        let mut failures = Vec::new();
        let mut run = |column| run_column(column, &mut wire, &mut failures);
        let cells: Vec<Cells> = columns.iter().map(&mut run).collect();
        let more: Vec<Cells> = mptcp.iter().map(run).collect();
        (cells, more, failures)
    });
    assert!(failures.is_empty(), "{}", failures.join("\n"));
    let tables = render("", &columns, &cells) + &render("MPTCP: ", &mptcp, &more);
    let text = format!("{BEGIN}{tables}\n{END}");
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("docs/packets.md");
    let document = fs::read_to_string(&path).unwrap();
    let (before, rest) = document.split_once(BEGIN).expect("the first marker");
    let (_, after) = rest.split_once(END).expect("the second marker");
    let current = format!("{before}{text}{after}");
    if env::var_os("WRITE_DOCS").is_some() {
        fs::write(path, current).unwrap();
        return;
    }
    assert!(
        document == current,
        "docs/packets.md is not current: run `make docs`"
    );
}

#[test]
fn every_action_has_a_column() {
    let columns: Vec<Column> = columns().into_iter().chain(mptcp_columns()).collect();
    for action in Registry::embedded().unwrap().actions() {
        let name = action.name.as_str();
        let shown = columns.iter().any(|column| column.action == name);
        assert!(shown != BLIND.contains(&name), "{name}");
    }
}

/// Actions without a column do the same with every packet: nothing to it.
#[test]
fn the_others_do_not_look() {
    let rows = tables(&Base::of(Change::Insert));
    let rows: Vec<&Row> = rows.iter().flat_map(|(_, rows)| rows).collect();
    for name in BLIND {
        let (action, verdict) = match name {
            "goto" => (json!({ "action": name, "chain": "sub" }), Verdict::Pass),
            "drop" => (json!({ "action": name }), Verdict::Drop),
            _ => (json!({ "action": name }), Verdict::Pass),
        };
        let chain = with_chains(
            json!({ "actions": [action] }),
            json!([{ "name": "sub" }]),
            json!({}),
        );
        for hook in Hook::ALL {
            let mut runner = load(&chain, hook);
            for row in rows.iter().filter(|row| row.at.contains(&At::Run(hook))) {
                for packet in &row.packets {
                    let bytes = packet.bytes_of(&packet.frame);
                    let outcome = runner.run(&bytes).unwrap();
                    assert_eq!(outcome.verdict, verdict, "{name}, {}", row.what);
                    assert!(outcome.reasons.is_empty(), "{name}, {}", row.what);
                    assert_eq!(outcome.frame, bytes, "{name}, {}", row.what);
                }
            }
        }
    }
}
