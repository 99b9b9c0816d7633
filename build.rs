// SPDX-License-Identifier: MIT OR Apache-2.0
//! Compiles the BPF code: the entry program to skeletons, every `policies/**/*.bpf.c` to objects
//! with a registry, each once per hook family. A policy whose parameters are not documented fails
//! the build.

use std::collections::BTreeMap;
use std::env;
use std::ffi::OsStr;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use libbpf_cargo::SkeletonBuilder;

#[allow(dead_code)]
#[path = "src/policy/btf.rs"]
mod btf;

const HEADERS: &str = "src/bpf";
const POLICIES: &str = "policies";
const ENTRY: &str = "src/bpf/entry.bpf.c";
const LEARNER: &str = "src/bpf/learner.bpf.c";

/// A hook family: how its files are called, and what selects it in C.
const FAMILIES: [(&str, &str); 2] = [("xdp", "-DHOOK_XDP"), ("tc", "-DHOOK_TC")];

fn main() -> Result<()> {
    println!("cargo:rerun-if-changed={HEADERS}");
    println!("cargo:rerun-if-changed={POLICIES}");
    let out = PathBuf::from(env::var_os("OUT_DIR").context("cargo sets OUT_DIR")?);
    for (family, define) in FAMILIES {
        skeleton(family, define, &out)?;
    }
    let mut registry = String::from("pub static EMBEDDED: &[EmbeddedPolicy] = &[\n");
    for (name, source) in policies(Path::new(POLICIES))? {
        writeln!(registry, "    {},", policy(&name, &source, &out)?)?;
    }
    registry.push_str("];\n");
    let learner = policy("learner", Path::new(LEARNER), &out)?;
    writeln!(registry, "pub static LEARNER: EmbeddedPolicy = {learner};")?;
    fs::write(out.join("registry.rs"), registry).context("write the registry")?;
    fs::write(out.join("reasons.rs"), reasons(&out)?).context("write the reasons")
}

fn compiler(source: &Path, define: &str) -> SkeletonBuilder {
    let mut builder = SkeletonBuilder::new();
    builder.source(source).clang_args([
        define,
        "-I",
        HEADERS,
        "-Wall",
        "-Wno-unused-function",
        "-Werror",
    ]);
    builder
}

/// The object's name goes in front of the names of its maps in the kernel.
fn skeleton(family: &str, define: &str, out: &Path) -> Result<()> {
    let folder = out.join(family);
    fs::create_dir_all(&folder).context("make a folder for the entry program")?;
    compiler(Path::new(ENTRY), define)
        .obj(folder.join("pc_entry.o"))
        .build_and_generate(out.join(format!("entry_{family}.skel.rs")))
        .with_context(|| format!("compile {ENTRY} with clang (Debian, Ubuntu: apt install clang)"))
}

/// Every policy source below `folder`, by name.
fn policies(folder: &Path) -> Result<BTreeMap<String, PathBuf>> {
    let mut found = BTreeMap::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).with_context(|| format!("read {}", folder.display()))? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
                continue;
            }
            let Some(name) = path
                .file_name()
                .and_then(OsStr::to_str)
                .and_then(|name| name.strip_suffix(".bpf.c"))
            else {
                continue;
            };
            if let Some(other) = found.insert(name.to_owned(), path.clone()) {
                bail!(
                    "{} and {} are both the policy {name}: rename one",
                    other.display(),
                    path.display()
                );
            }
        }
    }
    Ok(found)
}

/// Compiles a policy for each family and returns its entry of the registry.
fn policy(name: &str, source: &Path, out: &Path) -> Result<String> {
    let mut entry = format!("EmbeddedPolicy {{ name: {name:?}");
    for (family, define) in FAMILIES {
        let object = out.join(format!("{name}.{family}.o"));
        compiler(source, define)
            .obj(&object)
            .build()
            .with_context(|| format!("compile {}", source.display()))?;
        let bytes = fs::read(&object).with_context(|| format!("read {}", object.display()))?;
        btf::read(&bytes, name).with_context(|| format!("{}", source.display()))?;
        write!(entry, ", {family}: include_bytes!({object:?})")?;
    }
    entry.push_str(" }");
    Ok(entry)
}

/// The names of `enum reason`, in order and as users see them, from the BTF of the entry program.
fn reasons(out: &Path) -> Result<String> {
    let object = out.join(FAMILIES[0].0).join("pc_entry.o");
    let names = btf::enumerators_of(&fs::read(&object)?, "reason")?;
    let mut code = String::from("pub static REASONS: &[&str] = &[\n");
    for name in names.iter().filter(|name| *name != "count") {
        writeln!(code, "    {name:?},")?;
    }
    code.push_str("];\n");
    Ok(code)
}
