// SPDX-License-Identifier: MIT OR Apache-2.0
//! Errors a user can act on, by the exit code they lead to.
//!
//! Anything else that fails is an [`anyhow::Error`] with context and ends in [`EXIT_FAILED`].

use std::fmt;
use std::path::{Path, PathBuf};

/// Done.
pub const EXIT_DONE: u8 = 0;
/// Something failed at run time.
pub const EXIT_FAILED: u8 = 1;
/// Wrong usage, or an invalid chain file or element.
pub const EXIT_INVALID: u8 = 2;
/// Not permitted, or the kernel lacks a feature.
pub const EXIT_UNMET: u8 = 3;

/// A value of a file or of the command line that cannot be used. Exit code 2.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Invalid {
    /// File the value stands in; none for the command line.
    pub file: Option<PathBuf>,
    /// Where: a JSON path (`$.chains[0].actions[1].bytes`) or the argument's name.
    pub path: String,
    /// What was wrong with the value seen.
    pub found: String,
    /// What would have been accepted.
    pub expected: String,
    /// What to do next; may be empty.
    pub advice: String,
}

impl Invalid {
    pub fn new(
        path: impl fmt::Display,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        Invalid {
            path: path.to_string(),
            found: found.to_string(),
            expected: expected.to_string(),
            ..Invalid::default()
        }
    }

    pub fn advice(mut self, advice: impl fmt::Display) -> Self {
        self.advice = advice.to_string();
        self
    }

    pub fn in_file(mut self, file: &Path) -> Self {
        self.file = Some(file.to_owned());
        self
    }
}

impl fmt::Display for Invalid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(file) = &self.file {
            write!(f, "{}: ", file.display())?;
        }
        write!(f, "{}", self.path)?;
        write!(f, "\n  found:    {}", self.found)?;
        write!(f, "\n  expected: {}", self.expected)?;
        if !self.advice.is_empty() {
            write!(f, "\n  do:       {}", self.advice)?;
        }
        Ok(())
    }
}

impl std::error::Error for Invalid {}

/// The system refuses or lacks something. Exit code 3 if `denied`, else 1.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Refused {
    /// What could not be done, and to which object (device, pin, kernel feature).
    pub what: String,
    /// Why, as the system said it.
    pub why: String,
    /// What to do next.
    pub advice: String,
    /// Missing permission or kernel feature, rather than a state of things.
    pub denied: bool,
}

impl Refused {
    /// A state of the system in the way (device missing or busy, set full). Exit code 1.
    pub fn state(
        what: impl fmt::Display,
        why: impl fmt::Display,
        advice: impl fmt::Display,
    ) -> Self {
        Refused {
            what: what.to_string(),
            why: why.to_string(),
            advice: advice.to_string(),
            denied: false,
        }
    }

    /// A missing permission or kernel feature. Exit code 3.
    pub fn denied(
        what: impl fmt::Display,
        why: impl fmt::Display,
        advice: impl fmt::Display,
    ) -> Self {
        Refused {
            denied: true,
            ..Refused::state(what, why, advice)
        }
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.what)?;
        write!(f, "\n  why:      {}", self.why)?;
        if !self.advice.is_empty() {
            write!(f, "\n  do:       {}", self.advice)?;
        }
        Ok(())
    }
}

impl std::error::Error for Refused {}

/// The exit code of a failed command.
pub fn exit_code(error: &anyhow::Error) -> u8 {
    if error.downcast_ref::<Invalid>().is_some() {
        return EXIT_INVALID;
    }
    match error.downcast_ref::<Refused>() {
        Some(refused) if refused.denied => EXIT_UNMET,
        _ => EXIT_FAILED,
    }
}

/// ` (did you mean "x"?)` for the nearest of `known`, or nothing when none is near.
pub fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    let near = (word.chars().count() / 3).max(1);
    known
        .into_iter()
        .map(|candidate| (strsim::osa_distance(word, candidate), candidate))
        .filter(|(distance, _)| *distance <= near)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| format!(" (did you mean \"{candidate}\"?)"))
        .unwrap_or_default()
}
