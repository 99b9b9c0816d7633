// SPDX-License-Identifier: MIT OR Apache-2.0
//! Prints the BPF programs, maps and links that there are, one a line: what, id, kind of link. Used by
//! `make kernels` to see that nothing is left behind; needs root.

use std::process::ExitCode;

use anyhow::{Context, Result};
use policy_chain::engine::sys::{self, LinkKind};

fn main() -> ExitCode {
    match print() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Programs and maps are told by their id alone: opening one that is going would keep it.
fn print() -> Result<()> {
    for id in sys::programs() {
        println!("program {}", id.context("list the programs")?);
    }
    for id in sys::maps() {
        println!("map {}", id.context("list the maps")?);
    }
    for id in sys::links() {
        let id = id.context("list the links")?;
        // It may go while we look.
        let kind = sys::link_by_id(id)
            .and_then(sys::link_info)
            .map(|it| it.kind);
        println!("link {id} {}", kind.map_or("gone", name));
    }
    Ok(())
}

fn name(kind: LinkKind) -> &'static str {
    match kind {
        LinkKind::Xdp => "xdp",
        LinkKind::Tcx(_) => "tcx",
        LinkKind::Other(_) => "other",
    }
}
