// SPDX-License-Identifier: MIT OR Apache-2.0
//! Runs the captures of a folder through chains of every action, and checks what comes out. Used
//! by `make replay-corpus`; needs root, to load programs.
//!
//! ```text
//! replay-corpus FOLDER
//! ```

mod corpus;

use std::env;
use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = env::args().skip(1).collect();
    ExitCode::from(corpus::command(&arguments))
}
