// SPDX-License-Identifier: MIT OR Apache-2.0
//! Named network namespaces, as `ip netns` keeps them.
//!
//! Entering one changes the network namespace only. The mount namespace stays, so bpffs stays
//! visible (`ip netns exec` mounts a fresh `/sys` and hides it). The price is that
//! `/sys/class/net` and `/proc/net` keep showing the caller's namespace: read
//! `/proc/thread-self/net` instead. `/proc/sys/net` follows the calling thread.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::MetadataExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::{env, fs, panic, thread};

use anyhow::{Context, Result};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns, unshare};
use nix::sys::memfd::{MFdFlags, memfd_create};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};
use nix::unistd::geteuid;

use crate::error::{Invalid, Refused};

/// Where `ip netns` keeps its namespaces.
pub const FOLDER: &str = "/run/netns";

const AS_ROOT: &str = "run as root";
const INSTALL_IP: &str = "apt install iproute2";

mod request {
    nix::ioctl_none!(
        /// The `CLONE_NEW*` flag of the namespace a descriptor stands for.
        ns_get_nstype,
        0xb7,
        3
    );
}

/// Inode number of the calling thread's network namespace; unique among the living namespaces.
pub fn current_id() -> Result<u64> {
    let path = "/proc/thread-self/ns/net";
    let metadata = fs::metadata(path).with_context(|| format!("cannot read {path}"))?;
    Ok(metadata.ino())
}

/// A network namespace in a way that no later one shares: inode numbers are used again.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Id {
    pub inode: u64,
    /// The kernel's own number, used once.
    pub cookie: u64,
}

impl Id {
    /// The calling thread's.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn current() -> Result<Id> {
        Ok(Id {
            inode: current_id()?,
            cookie: current_cookie().context("ask for the network namespace's cookie")?,
        })
    }
}

fn current_cookie() -> io::Result<u64> {
    /// asm-generic/socket.h, Linux 5.14
    const SO_NETNS_COOKIE: libc::c_int = 71;
    let family = AddressFamily::Unix;
    let socket = socket(family, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    let mut cookie = 0u64;
    let mut length = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the option writes a u64 at most, for which there is room, and its length.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut length,
        )
    };
    match result {
        0 => Ok(cookie),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Whether some process is in the network namespace, or it is mounted where this process sees it.
/// What cannot be read counts as alive.
pub fn is_alive(inode: u64) -> bool {
    let name = format!("net:[{inode}]");
    let Ok(mounts) = fs::read_to_string("/proc/thread-self/mountinfo") else {
        return true;
    };
    // ID PARENT DEVICE ROOT POINT ...
    let is_mounted = |line: &str| line.split(' ').nth(3) == Some(&name);
    if mounts.lines().any(is_mounted) {
        return true;
    }
    let Ok(processes) = fs::read_dir("/proc") else {
        return true;
    };
    // Of each namespace that processes say they are in, one of them; and those that do not say.
    let mut others = HashMap::new();
    let mut silent = Vec::new();
    for process in processes.filter_map(|process| Some(process.ok()?.path())) {
        match fs::read_link(process.join("ns/net")) {
            Ok(link) if link.as_os_str() == OsStr::new(&name) => return true,
            Ok(link) => drop(others.insert(link, process)),
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => silent.push(process),
            // It has ended, or is no process.
            Err(_) => {}
        }
    }
    let others: HashSet<u64> = others
        .values()
        .filter_map(|process| net_file(process))
        .collect();
    let mut silent = silent.iter().filter_map(|process| net_file(process));
    silent.any(|file| !others.contains(&file))
}

/// The inode of a file that each network namespace has one of, seen through a process in it: to be
/// had also where the name of its namespace is not.
fn net_file(process: &Path) -> Option<u64> {
    Some(fs::metadata(process.join("net/dev")).ok()?.ino())
}

/// An open named network namespace. Clones share one descriptor.
///
/// The namespace lives as long as its name, a process in it, or one of these.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: String,
    id: u64,
    descriptor: Arc<OwnedFd>,
}

impl Namespace {
    /// Makes a namespace; its only device is `lo`, down.
    ///
    /// # Errors
    /// [`Invalid`] for a name that cannot be a file's. [`Refused`] (state) if the name is taken
    /// or iproute2 is missing, (denied) without root.
    pub fn create(name: &str) -> Result<Namespace> {
        check_name(name)?;
        let what = format!("cannot create network namespace {name}");
        require_root(&what)?;
        if Namespace::exists(name) {
            return Err(taken(&what, name).into());
        }
        let output = run_ip(
            &what,
            Command::new(find_program("ip", &what)?).args(["netns", "add", name]),
        )?;
        if !output.status.success() {
            let why = stderr_of(&output);
            if why.contains("File exists") {
                return Err(taken(&what, name).into());
            }
            return Err(refusal(&what, why).into());
        }
        Namespace::open(name)
    }

    /// Opens the namespace called `name`.
    ///
    /// # Errors
    /// [`Invalid`] for a name that cannot be a file's. [`Refused`] (state) if there is no such
    /// namespace or the file is not one, (denied) without permission.
    pub fn open(name: &str) -> Result<Namespace> {
        check_name(name)?;
        let what = format!("cannot open network namespace {name}");
        let file = File::open(path_of(name)).map_err(|error| open_refusal(&what, name, &error))?;
        // SAFETY: the descriptor is open for the whole call, and this request takes no argument.
        let kind = unsafe { request::ns_get_nstype(file.as_raw_fd()) };
        if kind != Ok(CloneFlags::CLONE_NEWNET.bits()) {
            return Err(Refused::state(
                what,
                format!("{FOLDER}/{name} is not a network namespace"),
                format!("remove the left-over with: ip netns del {name}"),
            )
            .into());
        }
        let id = file
            .metadata()
            .with_context(|| format!("cannot inspect {FOLDER}/{name}"))?
            .ino();
        Ok(Namespace {
            name: name.to_owned(),
            id,
            descriptor: Arc::new(file.into()),
        })
    }

    /// Makes a namespace that has no name in [`FOLDER`]: `name` is for messages only. Its only
    /// device is `lo`, down.
    ///
    /// # Errors
    /// [`Refused`] (denied) without permission.
    pub fn unnamed(name: &str) -> Result<Namespace> {
        let make = || -> Result<File> {
            unshare(CloneFlags::CLONE_NEWNET).map_err(|errno| {
                let what = format!("cannot create network namespace {name}");
                match errno {
                    Errno::EPERM => Refused::denied(what, errno.desc(), AS_ROOT),
                    _ => Refused::state(what, errno.desc(), ""),
                }
            })?;
            File::open("/proc/thread-self/ns/net").context("cannot open a new network namespace")
        };
        let file = on_thread(name, make)?;
        let id = file.metadata().context("cannot inspect a namespace")?.ino();
        Ok(Namespace {
            name: name.to_owned(),
            id,
            descriptor: Arc::new(file.into()),
        })
    }

    /// Whether `name` is taken in [`FOLDER`].
    pub fn exists(name: &str) -> bool {
        check_name(name).is_ok() && path_of(name).symlink_metadata().is_ok()
    }

    /// Removes the name; see [`Namespace::remove`].
    pub fn delete(self) -> Result<()> {
        Namespace::remove(&self.name)
    }

    /// Removes the name `name`, also a left-over that is no namespace. The namespace itself goes
    /// once no process and no [`Namespace`] uses it; its devices then go with it.
    ///
    /// # Errors
    /// As [`Namespace::open`].
    pub fn remove(name: &str) -> Result<()> {
        check_name(name)?;
        let what = format!("cannot remove network namespace {name}");
        if !Namespace::exists(name) {
            return Err(missing(&what, name).into());
        }
        require_root(&what)?;
        let output = run_ip(
            &what,
            Command::new(find_program("ip", &what)?).args(["netns", "del", name]),
        )?;
        if !output.status.success() {
            return Err(refusal(&what, stderr_of(&output)).into());
        }
        Ok(())
    }

    /// The name in [`FOLDER`].
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Inode number, comparable with [`current_id`].
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Runs `f` on a fresh thread inside the namespace and returns what it returned. The caller's
    /// thread stays where it is; threads and processes that `f` starts, and sockets it opens,
    /// belong to the namespace. A panic of `f` goes on in the caller.
    ///
    /// # Errors
    /// [`Refused`] (denied) without permission to enter.
    pub fn enter<R: Send>(&self, f: impl FnOnce() -> R + Send) -> Result<R> {
        let inside = || -> Result<R> {
            setns(&*self.descriptor, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| self.enter_refusal(errno))?;
            Ok(f())
        };
        on_thread(&self.name, inside)
    }

    /// A command that will run in the namespace. Without permission to enter, spawning it fails
    /// with [`io::ErrorKind::PermissionDenied`].
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let descriptor = Arc::clone(&self.descriptor);
        let enter = move || {
            setns(&*descriptor, CloneFlags::CLONE_NEWNET)
                .map_err(|errno| io::Error::from_raw_os_error(errno as i32))
        };
        let mut command = Command::new(program);
        // SAFETY: between fork and exec the closure makes one system call on a descriptor opened
        // before; it neither allocates nor locks, and the `Arc` is dropped by the parent only.
        unsafe { command.pre_exec(enter) };
        command
    }

    /// Runs the lines of `script` in the namespace as commands of `ip`, up to the first that
    /// fails, in one process.
    ///
    /// # Errors
    /// [`Refused`] with the line that failed; (denied) without permission or kernel support.
    pub fn ip_batch(&self, script: &str) -> Result<()> {
        self.batch("ip", script)
    }

    /// As [`Namespace::ip_batch`], with commands of `tc`.
    ///
    /// # Errors
    /// As there.
    pub fn tc_batch(&self, script: &str) -> Result<()> {
        self.batch("tc", script)
    }

    fn batch(&self, program: &str, script: &str) -> Result<()> {
        let what = format!("cannot configure network namespace {}", self.name);
        let mut command = self.command(find_program(program, &what)?);
        command.args(["-batch", "-"]).stdin(input_of(script)?);
        let output = run_ip(&what, &mut command)?;
        if output.status.success() {
            return Ok(());
        }
        let why = stderr_of(&output);
        let what = match failed_line(&why, script) {
            Some(line) => format!("{what}: {program} {line}"),
            None => what,
        };
        Err(refusal(&what, why).into())
    }

    fn enter_refusal(&self, errno: Errno) -> Refused {
        let what = format!("cannot enter network namespace {}", self.name);
        match errno {
            Errno::EPERM => Refused::denied(what, errno.desc(), AS_ROOT),
            _ => Refused::state(what, errno.desc(), ""),
        }
    }
}

/// Runs `f` on a thread that may leave its namespace for good. A panic of `f` goes on in the caller.
fn on_thread<R: Send>(name: &str, f: impl FnOnce() -> Result<R> + Send) -> Result<R> {
    thread::scope(|scope| {
        let thread = thread::Builder::new()
            .name(format!("netns {name}"))
            .spawn_scoped(scope, f)
            .context("cannot start a thread")?;
        thread
            .join()
            .unwrap_or_else(|cause| panic::resume_unwind(cause))
    })
}

fn path_of(name: &str) -> PathBuf {
    Path::new(FOLDER).join(name)
}

/// Names end up as file names and on the command line of `ip`.
fn check_name(name: &str) -> Result<(), Invalid> {
    let usable = name
        .bytes()
        .all(|byte| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'_' | b'-' | b'+'));
    let starts_well = name
        .bytes()
        .next()
        .is_some_and(|byte| byte.is_ascii_alphanumeric());
    if usable && starts_well && name.len() <= 255 {
        return Ok(());
    }
    Err(Invalid::new(
        "network namespace",
        format!("\"{name}\""),
        "1 to 255 of A-Z a-z 0-9 . _ - +, a letter or digit first",
    ))
}

fn require_root(what: &str) -> Result<(), Refused> {
    if geteuid().is_root() {
        return Ok(());
    }
    Err(Refused::denied(what, "not running as root", AS_ROOT))
}

fn taken(what: &str, name: &str) -> Refused {
    Refused::state(
        what,
        format!("{FOLDER}/{name} exists"),
        format!("choose another name, or remove it with: ip netns del {name}"),
    )
}

fn missing(what: &str, name: &str) -> Refused {
    Refused::state(
        what,
        format!("{FOLDER}/{name} does not exist"),
        "list the namespaces with: ip netns list",
    )
}

fn open_refusal(what: &str, name: &str, error: &io::Error) -> Refused {
    match error.kind() {
        io::ErrorKind::NotFound => missing(what, name),
        io::ErrorKind::PermissionDenied => Refused::denied(what, error, AS_ROOT),
        _ => Refused::state(what, error, ""),
    }
}

/// What `ip` said, as a refusal. It has no exit codes for causes; its words are the C locale's.
fn refusal(what: &str, why: String) -> Refused {
    if why.contains("not permitted") || why.contains("Permission denied") {
        return Refused::denied(
            what,
            why,
            "run as root, with CAP_SYS_ADMIN and CAP_NET_ADMIN",
        );
    }
    if [
        "not supported",
        "Unknown device type",
        "qdisc kind is unknown",
    ]
    .iter()
    .any(|it| why.contains(it))
    {
        return Refused::denied(
            what,
            why,
            "use a kernel with network namespaces, veth, IPv6 and what else is asked for here",
        );
    }
    Refused::state(what, why, "")
}

/// A program of iproute2. Root's folders are searched even if `PATH` lacks them (`su` keeps the
/// user's).
fn find_program(name: &str, what: &str) -> Result<PathBuf, Refused> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path)
        .chain(["/usr/sbin", "/sbin"].map(PathBuf::from))
        .map(|folder| folder.join(name))
        .find(|program| program.is_absolute() && program.is_file())
        .ok_or_else(|| {
            let why = format!("the program {name} is missing");
            Refused::state(what, why, INSTALL_IP)
        })
}

fn run_ip(what: &str, command: &mut Command) -> Result<Output, Refused> {
    command
        .env("LC_ALL", "C")
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .output()
        .map_err(|error| match error.kind() {
            io::ErrorKind::NotFound => {
                Refused::state(what, "a program of iproute2 is missing", INSTALL_IP)
            }
            io::ErrorKind::PermissionDenied => Refused::denied(what, error, AS_ROOT),
            _ => Refused::state(what, error, ""),
        })
}

fn stderr_of(output: &Output) -> String {
    let text = String::from_utf8_lossy(&output.stderr).trim().to_owned();
    if text.is_empty() {
        format!("ip: {}", output.status)
    } else {
        text
    }
}

/// The line of `script` that `ip -batch -` reports as failed (`Command failed -:3`).
fn failed_line<'a>(report: &str, script: &'a str) -> Option<&'a str> {
    let number: usize = report
        .lines()
        .find_map(|line| line.strip_prefix("Command failed -:"))?
        .trim()
        .parse()
        .ok()?;
    script.lines().nth(number.checked_sub(1)?)
}

/// A standard input holding `text`: a file, since a pipe blocks when full and raises SIGPIPE when
/// its reader is gone.
fn input_of(text: &str) -> Result<Stdio> {
    let memory = memfd_create("ip-batch", MFdFlags::MFD_CLOEXEC).context("memfd_create")?;
    let mut file = File::from(memory);
    file.write_all(text.as_bytes())
        .and_then(|()| file.rewind())
        .context("cannot store the commands for ip")?;
    Ok(file.into())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::expect_used)]
mod tests {
    use std::net::TcpListener;
    use std::process;

    use super::*;
    use crate::error::{EXIT_FAILED, EXIT_INVALID, EXIT_UNMET, exit_code};

    /// A namespace that goes with the test, also a failed one.
    struct Scoped(Namespace);

    impl Scoped {
        fn new(word: &str) -> Scoped {
            let name = format!("pc-netns-test-{}-{word}", process::id());
            Scoped(Namespace::create(&name).unwrap())
        }
    }

    impl Drop for Scoped {
        fn drop(&mut self) {
            if Namespace::exists(self.0.name()) {
                let _ = Namespace::remove(self.0.name());
            }
        }
    }

    #[test]
    fn life_of_a_namespace() {
        let scoped = Scoped::new("life");
        let namespace = scoped.0.clone();
        let name = namespace.name().to_owned();
        assert!(Namespace::exists(&name));
        assert_eq!(Namespace::open(&name).unwrap().id(), namespace.id());
        assert_ne!(current_id().unwrap(), namespace.id());
        let again = Namespace::create(&name).unwrap_err();
        assert_eq!(exit_code(&again), EXIT_FAILED);
        assert!(again.to_string().contains("exists"), "{again}");
        namespace.delete().unwrap();
        assert!(!Namespace::exists(&name));
        let gone = Namespace::open(&name).unwrap_err();
        assert!(gone.downcast_ref::<Refused>().is_some_and(|it| !it.denied));
        assert!(Namespace::remove(&name).is_err());
    }

    #[test]
    fn enter_is_only_for_its_thread() {
        let scoped = Scoped::new("enter");
        let before = current_id().unwrap();
        let (inside, grandchild, mounts) = scoped
            .0
            .enter(|| {
                let grandchild = thread::spawn(|| current_id().unwrap()).join().unwrap();
                let mounts = fs::read_link("/proc/thread-self/ns/mnt").unwrap();
                (current_id().unwrap(), grandchild, mounts)
            })
            .unwrap();
        assert_eq!(inside, scoped.0.id());
        assert_eq!(grandchild, scoped.0.id());
        assert_eq!(mounts, fs::read_link("/proc/thread-self/ns/mnt").unwrap());
        assert_eq!(current_id().unwrap(), before);
    }

    #[test]
    fn enter_borrows_and_passes_panics_on() {
        let scoped = Scoped::new("borrow");
        let mut seen = Vec::new();
        scoped.0.enter(|| seen.push(1)).unwrap();
        assert_eq!(seen, [1]);
        let cause = panic::catch_unwind(|| scoped.0.enter(|| panic::resume_unwind(Box::new(7))));
        assert_eq!(cause.unwrap_err().downcast_ref::<i32>(), Some(&7));
    }

    #[test]
    fn commands_and_sockets_are_inside() {
        let scoped = Scoped::new("command");
        scoped.0.ip_batch("link set lo up\n").unwrap();
        let output = scoped
            .0
            .command("readlink")
            .arg("/proc/self/ns/net")
            .output()
            .unwrap();
        let expected = format!("net:[{}]\n", scoped.0.id());
        assert_eq!(String::from_utf8_lossy(&output.stdout), expected);
        let listener = scoped
            .0
            .enter(|| TcpListener::bind("127.0.0.1:0"))
            .unwrap()
            .unwrap();
        let table = scoped
            .0
            .enter(|| fs::read_to_string("/proc/thread-self/net/tcp"))
            .unwrap()
            .unwrap();
        let port = format!(":{:04X} ", listener.local_addr().unwrap().port());
        assert!(table.contains(&port), "{table}");
    }

    #[test]
    fn namespaces_of_others_are_alive() {
        /// Runs it on a thread of a user who may not see where root's processes are.
        fn as_nobody<R: Send>(f: impl FnOnce() -> R + Send) -> R {
            const NOBODY: libc::uid_t = 65534;
            let inside = || {
                // SAFETY: integers only; unlike the function of libc it is for this thread only.
                let result = unsafe { libc::syscall(libc::SYS_setresuid, NOBODY, NOBODY, NOBODY) };
                assert_eq!(result, 0);
                Ok(f())
            };
            on_thread("nobody", inside).unwrap()
        }
        let scoped = Scoped::new("alive");
        let inode = scoped.0.id();
        assert!(is_alive(inode));
        let mut process = scoped.0.command("sleep").arg("60").spawn().unwrap();
        Namespace::remove(scoped.0.name()).unwrap();
        let alive = [is_alive(inode), as_nobody(|| is_alive(inode))];
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(alive, [true; 2]);
        assert!(is_alive(current_id().unwrap()));
    }

    #[test]
    fn a_failed_batch_names_its_line() {
        let scoped = Scoped::new("batch");
        let error = scoped
            .0
            .ip_batch("link set lo up\nlink set nowhere up\nlink set lo down\n")
            .unwrap_err()
            .to_string();
        assert!(error.contains("ip link set nowhere up"), "{error}");
    }

    #[test]
    fn names_are_checked() {
        for name in ["", ".", "..", "a/b", "-x", "a b", "a\n"] {
            let error = Namespace::create(name).unwrap_err();
            assert_eq!(exit_code(&error), EXIT_INVALID, "{name:?}");
            assert!(!Namespace::exists(name));
        }
    }

    #[test]
    fn words_of_ip_become_exit_codes() {
        let code = |why: &str| exit_code(&refusal("x", why.to_owned()).into());
        assert_eq!(
            code("RTNETLINK answers: Operation not permitted"),
            EXIT_UNMET
        );
        assert_eq!(
            code("RTNETLINK answers: Operation not supported"),
            EXIT_UNMET
        );
        assert_eq!(code("RTNETLINK answers: File exists"), EXIT_FAILED);
    }
}
