// SPDX-License-Identifier: MIT OR Apache-2.0
//! JSON text to values, stricter than `serde_json`: no key twice in one object, bounded size.

use std::cell::RefCell;
use std::fmt;
use std::fs::File;
use std::io::{ErrorKind, Read};
use std::path::Path;

use serde::de::{DeserializeSeed, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Number, Value};

use crate::error::{Invalid, Refused};

/// Largest file read, in bytes.
pub const MAX_BYTES: usize = 64 << 20;

/// Most characters of a file's value that an error message repeats.
const SHOWN: usize = 60;

/// Reads a UTF-8 file of at most [`MAX_BYTES`].
///
/// # Errors
/// [`Invalid`] for a file that does not exist, is too large or not text, [`Refused`] for one that
/// may not be read, and any other failure of the system with context.
pub fn read_text(file: &Path) -> anyhow::Result<String> {
    let mut bytes = Vec::new();
    File::open(file)
        .and_then(|opened| {
            opened
                .take(MAX_BYTES as u64 + 1)
                .read_to_end(&mut bytes)
                .map(drop)
        })
        .map_err(|error| unreadable(file, error))?;
    if bytes.len() > MAX_BYTES {
        return Err(too_large(file).into());
    }
    String::from_utf8(bytes).map_err(|error| not_text(file, &error).into())
}

fn unreadable(file: &Path, error: std::io::Error) -> anyhow::Error {
    let found = match error.kind() {
        ErrorKind::NotFound => "no such file",
        ErrorKind::IsADirectory => "a directory",
        ErrorKind::PermissionDenied => {
            return Refused::denied(
                format_args!("cannot read {}", file.display()),
                error,
                "run as a user who may read the file",
            )
            .into();
        }
        _ => return anyhow::Error::new(error).context(format!("reading {}", file.display())),
    };
    Invalid::new("FILE", found, "a chain file")
        .advice("check the name")
        .in_file(file)
        .into()
}

fn too_large(file: &Path) -> Invalid {
    Invalid::new(
        "$",
        format_args!("more than {} MiB", MAX_BYTES >> 20),
        format_args!("at most {} MiB", MAX_BYTES >> 20),
    )
    .advice("put many keys into a set with `policy-chain set load` instead of the chain file")
    .in_file(file)
}

fn not_text(file: &Path, error: &std::string::FromUtf8Error) -> Invalid {
    let before = &error.as_bytes()[..error.utf8_error().valid_up_to()];
    let line = 1 + before.iter().filter(|byte| **byte == b'\n').count();
    let column = 1 + before.iter().rev().take_while(|b| **b != b'\n').count();
    Invalid::new(
        position(line, column),
        "bytes that are not UTF-8",
        "JSON text in UTF-8",
    )
    .advice("save the file as UTF-8")
    .in_file(file)
}

fn position(line: usize, column: usize) -> String {
    format!("line {line}, column {column}")
}

/// Parses one JSON document of at most [`MAX_BYTES`]; a byte order mark before it is skipped.
///
/// # Errors
/// Text that is no JSON, is nested beyond 127 levels, or has a key twice in one object. The path
/// of the error is the line and column (in bytes, from 1) where reading stopped.
pub fn parse(text: &str, file: &Path) -> Result<Value, Invalid> {
    if text.len() > MAX_BYTES {
        return Err(too_large(file));
    }
    let text = text.strip_prefix('\u{feff}').unwrap_or(text);
    let duplicate = RefCell::new(None);
    let mut reader = serde_json::Deserializer::from_str(text);
    Strict {
        duplicate: &duplicate,
    }
    .deserialize(&mut reader)
    .and_then(|value| reader.end().map(|()| value))
    .map_err(|error| explain(text, &error, duplicate.take()).in_file(file))
}

fn explain(text: &str, error: &serde_json::Error, duplicate: Option<String>) -> Invalid {
    let path = position(error.line(), error.column());
    if let Some(key) = duplicate {
        return Invalid::new(
            path,
            format_args!("the key {} twice in one object", quote(&key)),
            "each key once",
        )
        .advice("remove or rename one of them");
    }
    let message = error.to_string();
    let reason = message
        .rsplit_once(" at line ")
        .map_or(message.as_str(), |(reason, _)| reason);
    if text.trim().is_empty() {
        return Invalid::new(path, "an empty file", "a JSON object")
            .advice("start from {\"version\": 1, \"chains\": []}");
    }
    if reason.contains("recursion limit") {
        return Invalid::new(
            path,
            "lists or objects nested too deep",
            "at most 127 levels",
        )
        .advice("a chain file needs 8 levels; remove the surplus brackets");
    }
    let found = match excerpt(text, error.line(), error.column()) {
        line if line.is_empty() => reason.to_owned(),
        line => format!("{reason}: {line}"),
    };
    Invalid::new(path, found, "valid JSON").advice(if error.is_eof() {
        "the text ends too early: add the missing bracket or quote"
    } else {
        "check commas, quotes and brackets there; JSON has no comments and no comma after the last item"
    })
}

/// The part of a line around a column.
fn excerpt(text: &str, line: usize, column: usize) -> String {
    let line = text.lines().nth(line.saturating_sub(1)).unwrap_or_default();
    let mut from = column.saturating_sub(SHOWN / 2).min(line.len());
    while !line.is_char_boundary(from) {
        from -= 1;
    }
    shorten(line[from..].trim())
}

/// The text without characters that would upset a terminal, cut to what an error can show.
pub fn shorten(text: &str) -> String {
    let mut short = String::new();
    for (at, c) in text.chars().enumerate() {
        if at == SHOWN {
            short.push_str("...");
            break;
        }
        if c == '\u{fffd}' || c.is_control() || is_invisible(c) {
            short.extend(c.escape_unicode());
        } else {
            short.push(c);
        }
    }
    short
}

/// Zero-width and direction-changing characters, which make a message read as something else.
fn is_invisible(c: char) -> bool {
    matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{feff}')
}

/// The text as an error shows it: quoted, shortened.
pub fn quote(text: &str) -> String {
    format!("\"{}\"", shorten(text))
}

/// The value as an error shows it: JSON on one line, shortened.
pub fn show(value: &Value) -> String {
    shorten(&value.to_string())
}

/// The JSON path of a member of the object at `path`.
pub fn member(path: &str, key: &str) -> String {
    let plain = key.starts_with(|c: char| c.is_ascii_alphabetic() || c == '_')
        && key.len() <= SHOWN
        && key
            .chars()
            .all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
    if plain {
        format!("{path}.{key}")
    } else {
        format!("{path}[{}]", quote(key))
    }
}

/// Builds a [`Value`], refusing an object's second use of a key.
#[derive(Clone, Copy)]
struct Strict<'a> {
    /// The key seen twice: an error's text alone does not tell it from a syntax error.
    duplicate: &'a RefCell<Option<String>>,
}

impl<'de> DeserializeSeed<'de> for Strict<'_> {
    type Value = Value;

    fn deserialize<D: Deserializer<'de>>(self, deserializer: D) -> Result<Value, D::Error> {
        deserializer.deserialize_any(self)
    }
}

impl<'de> Visitor<'de> for Strict<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a JSON value")
    }

    fn visit_unit<E>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_bool<E>(self, value: bool) -> Result<Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_u64<E>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Number::from_f64(value)
            .map(Value::Number)
            .ok_or_else(|| E::custom("number out of range"))
    }

    fn visit_str<E>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_string<E>(self, value: String) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(item) = items.next_element_seed(self)? {
            list.push(item);
        }
        Ok(Value::Array(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut object = Map::new();
        while let Some(key) = members.next_key::<String>()? {
            if object.contains_key(&key) {
                *self.duplicate.borrow_mut() = Some(key);
                return Err(A::Error::custom("duplicate key"));
            }
            let value = members.next_value_seed(self)?;
            object.insert(key, value);
        }
        Ok(Value::Object(object))
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used)]
    use super::*;

    fn refused(text: &str) -> Invalid {
        parse(text, Path::new("f.json")).unwrap_err()
    }

    #[test]
    fn values_are_those_of_serde_json() {
        for text in [
            "null",
            " [1, -2, 3.5, 18446744073709551615, true, \"\\u00e9\", {}, []] ",
            "{\"b\": {\"a\": 1}, \"a\": {\"a\": 2}}",
        ] {
            let expected: Value = serde_json::from_str(text).unwrap();
            assert_eq!(parse(text, Path::new("f")).unwrap(), expected);
        }
        assert!(parse("\u{feff}{}", Path::new("f")).is_ok());
    }

    #[test]
    fn duplicate_keys_are_refused_with_their_place() {
        let error = refused("{\n  \"a\": 1,\n  \"b\": [{\"c\": 1, \"c\": 2}]\n}");
        assert_eq!(error.path, "line 3, column 20");
        assert!(error.found.contains("\"c\" twice"), "{error}");
        assert_eq!(error.file.as_deref(), Some(Path::new("f.json")));
        // Escapes are resolved before keys are compared.
        assert!(refused(r#"{"a": 1, "\u0061": 2}"#).found.contains("twice"));
    }

    #[test]
    fn syntax_errors_show_the_line() {
        let error = refused("{\n  \"a\": 1,\n}");
        assert!(error.path.starts_with("line 3"), "{error}");
        assert!(error.found.contains("trailing comma"), "{error}");
        assert!(refused("{\"a\": [1, 2").advice.contains("too early"));
        assert!(refused("{} {}").found.contains("trailing characters"));
        assert!(refused("1e999").found.contains("out of range"));
        assert_eq!(refused(" \n").found, "an empty file");
        // An excerpt that begins inside a character.
        let error = refused(&format!("{{\"{}\" 1}}", "é".repeat(200)));
        assert!(error.to_string().chars().count() < 400, "{error}");
    }

    #[test]
    fn deep_nesting_is_an_error() {
        for open in ["[", "{\"a\":"] {
            let error = refused(&open.repeat(5_000_000 / open.len()));
            assert!(error.found.contains("too deep"), "{error}");
        }
        let deepest = format!("{}{}", "[".repeat(127), "]".repeat(127));
        assert!(parse(&deepest, Path::new("f")).is_ok());
        assert!(refused(&format!("[{deepest}]")).found.contains("too deep"));
    }

    #[test]
    fn large_files_are_refused() {
        let error = refused(&" ".repeat(MAX_BYTES + 1));
        assert_eq!(error.expected, "at most 64 MiB");
    }

    #[test]
    fn unreadable_files_name_the_reason() {
        let folder = std::env::temp_dir();
        for (file, found) in [
            (
                folder.join("policy-chain-no-such-file.json"),
                "no such file",
            ),
            (folder.clone(), "a directory"),
        ] {
            let error = read_text(&file).unwrap_err();
            assert_eq!(error.downcast_ref::<Invalid>().unwrap().found, found);
        }
        let file = folder.join(format!("policy-chain-json-{}", std::process::id()));
        std::fs::write(&file, b"{\n \"a\": \"\xff\"}").unwrap();
        let error = read_text(&file).unwrap_err();
        std::fs::remove_file(&file).unwrap();
        assert_eq!(
            error.downcast_ref::<Invalid>().unwrap().path,
            "line 2, column 8"
        );
    }

    #[test]
    fn shown_values_are_short_and_harmless() {
        assert_eq!(shorten("a\u{1b}[31m"), "a\\u{1b}[31m");
        assert_eq!(shorten(&"x".repeat(100)).len(), 63);
        assert_eq!(member("$", "a b"), "$[\"a b\"]");
        assert_eq!(member("$.sets", "my-set"), "$.sets.my-set");
    }
}
