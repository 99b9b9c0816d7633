// SPDX-License-Identifier: MIT OR Apache-2.0
//! The command line: arguments to library calls, results to text, errors to exit codes.

mod cli;

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::Parser;
use policy_chain::engine::sys;
use policy_chain::error::{EXIT_DONE, exit_code};

fn main() -> ExitCode {
    sys::silence_libbpf();
    sys::raise_memlock();
    let code = match cli::run(cli::Cli::parse()) {
        Ok(code) => code,
        // The reader of our output went away, as `head` does.
        Err(error) if is_broken_pipe(&error) => EXIT_DONE,
        Err(error) => {
            // There is nobody left to tell if this fails.
            drop(writeln!(std::io::stderr(), "error: {}", message(&error)));
            exit_code(&error)
        }
    };
    ExitCode::from(code)
}

fn is_broken_pipe(error: &anyhow::Error) -> bool {
    error
        .downcast_ref::<std::io::Error>()
        .is_some_and(|error| error.kind() == ErrorKind::BrokenPipe)
}

/// The causes, outermost first, each on a line of its own.
fn message(error: &anyhow::Error) -> String {
    let causes: Vec<String> = error.chain().map(ToString::to_string).collect();
    causes.join("\n  because: ")
}
