// SPDX-License-Identifier: MIT OR Apache-2.0
//! Commands and their output.

use std::ffi::OsString;
use std::io::{IsTerminal, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, Parser, Subcommand, ValueEnum};
use policy_chain::agent;
use policy_chain::engine::apply::{self, Change, Options, Report};
use policy_chain::engine::generation::CarrierChoice;
use policy_chain::engine::sets::{self, NamedSet};
use policy_chain::engine::store::{DEFAULT_FOLDER, Store};
use policy_chain::engine::view;
use policy_chain::error::{EXIT_DONE, EXIT_FAILED, Invalid, Refused};
use policy_chain::hook::Hook;
use policy_chain::monitor::{self, Message, connections};
use policy_chain::policy::{self, Registry};
use policy_chain::replay::{self, Runner};
use policy_chain::spec::{self, Chain, Spec, json};
use policy_chain::testbed::{self, Announce, Role, Testbed};
use policy_chain::{hook, plan};
use serde_json::Value;

const EXAMPLES: &str = "\
Examples:
  policy-chain policies                   what there is to build chains from
  policy-chain check web.json             is this chain file right?
  policy-chain apply --dry-run web.json   what would change?
  policy-chain apply web.json             make it run
  policy-chain list                       what runs, and how many packets it took
  policy-chain show web                   what each of its nodes did
  policy-chain events                     what chains report of Multipath TCP, as it happens
  policy-chain delete web                 take it away";

/// Compose packet policies into chains that the kernel runs, on XDP and TC.
///
/// A chain file (JSON) says which packets (selectors) and what happens to them (actions).
/// `check` reads it, `apply` runs it, `list` and `show` tell what runs and what it counted.
///
/// Exit codes: 0 done; 1 failed at run time; 2 wrong usage or invalid chain file; 3 not permitted,
/// or the kernel lacks something.
#[derive(Parser)]
#[command(name = "policy-chain", version, max_term_width = 100, after_help = EXAMPLES)]
pub struct Cli {
    /// Folder in a bpffs where chains are kept
    #[arg(long, global = true, value_name = "DIR", default_value = DEFAULT_FOLDER)]
    bpffs: PathBuf,
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Check chain files without touching anything; needs no privileges
    ///
    /// Sets and sub-chains that a file uses must be defined in the files given. Devices need not
    /// exist.
    Check {
        /// Chain files
        #[arg(required = true, value_name = "FILE")]
        files: Vec<PathBuf>,
    },
    /// Make what runs what chain files say
    ///
    /// Chains named in the files are created or replaced, others stay. New programs are loaded and
    /// tried beside the running ones; each device and hook then switches in one step. If anything
    /// fails, all that ran before keeps running.
    Apply(Apply),
    /// List the chains that run, in the order packets see them
    List {
        /// Those of other network namespaces too
        #[arg(long)]
        all_netns: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Show one chain: its nodes, what they counted, and why they left packets alone
    Show {
        /// Name of the chain
        name: String,
        #[command(flatten)]
        output: Output,
    },
    /// Take chains away
    Delete {
        /// Names of chains
        #[arg(
            required_unless_present = "all",
            conflicts_with = "all",
            value_name = "NAME"
        )]
        names: Vec<String>,
        /// All chains and sets of this network namespace
        #[arg(long)]
        all: bool,
        /// With --all: in all network namespaces
        #[arg(long, requires = "all")]
        all_netns: bool,
        /// Also a sub-chain that elements of sets name; such packets then pass
        #[arg(long)]
        force: bool,
    },
    /// Do what needs a process, until interrupted: chains run without it, and go on if it ends
    ///
    /// Attaches chains again whose device went and comes back, and those of a pattern to each new
    /// device that matches. Sends an acknowledgement through subflows on which a chain waits for a
    /// packet with room. Reads what chains report, for all who follow `events`. Removes what has
    /// expired from sets. Works in the network namespace it is started in.
    Agent,
    /// Look at and change sets while chains run
    Set {
        #[command(subcommand)]
        command: SetCommand,
    },
    /// List the TCP and MPTCP connections that chains here know of, with their subflows
    ///
    /// Those of MPTCP are known while a chain with an MPTCP policy runs; all of TCP, and packets,
    /// bytes, rates and round-trip times, with the action "record". RTT is from this device to the
    /// other end; it takes a chain on both directions of the device.
    Connections {
        /// Those that have ended too
        #[arg(long)]
        all: bool,
        /// How long to watch for the rates: 200ms, 2s, ...
        #[arg(long, value_name = "TIME", default_value = "500ms", value_parser = parse_time)]
        over: Duration,
        #[command(flatten)]
        output: Output,
    },
    /// Follow what chains with the action `report` tell of Multipath TCP
    ///
    /// One line an event, of what passes from now on, until interrupted. Any number may follow at
    /// once; who cannot keep up is told how many events are missing. Times are UTC. With --json,
    /// one object a line.
    Events(Events),
    /// List the policies, or describe one
    Policies {
        /// Name of a policy
        name: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Print the JSON Schema of chain files
    Schema,
    /// Run the packets of a capture through a chain's real programs; no device is needed
    ///
    /// Sets named in the file are empty. With --json, one object a packet.
    Replay(Replay),
    /// Make and remove networks of namespaces to try chains on
    Testbed {
        #[command(subcommand)]
        command: TestbedCommand,
    },
}

#[derive(Args)]
struct Apply {
    /// Chain files
    #[arg(required = true, value_name = "FILE")]
    files: Vec<PathBuf>,
    /// Load and try everything, print what would change, change nothing
    #[arg(long)]
    dry_run: bool,
    /// Remove the chains and sets that the files do not name
    #[arg(long)]
    prune: bool,
    /// Where the context of packets lives [default: as before, at first auto]
    #[arg(long, value_name = "WHERE")]
    carrier: Option<CarrierArgument>,
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, ValueEnum)]
enum CarrierArgument {
    /// In the packet; per CPU on devices that cannot
    Auto,
    /// Per CPU
    Percpu,
}

impl From<CarrierArgument> for CarrierChoice {
    fn from(argument: CarrierArgument) -> Self {
        match argument {
            CarrierArgument::Auto => CarrierChoice::Auto,
            CarrierArgument::Percpu => CarrierChoice::PerCpu,
        }
    }
}

#[derive(Args)]
struct Events {
    /// End after so many events
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..))]
    count: Option<u64>,
    /// End after a time such as 500ms, 30s, 5m; with --count that is a failure
    #[arg(long, value_name = "TIME", value_parser = parse_time)]
    timeout: Option<Duration>,
    /// Begin although no chain reports yet
    #[arg(long)]
    wait: bool,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Replay {
    /// Chain file
    file: PathBuf,
    /// The chain to run; the sub-chains it goes to come along
    #[arg(long, value_name = "NAME")]
    chain: String,
    /// Capture to read: pcap or pcapng; Ethernet, raw IP, Linux cooked
    #[arg(long = "in", value_name = "CAPTURE")]
    input: PathBuf,
    /// Capture to write: every packet that was not dropped, as it left
    #[arg(long = "out", value_name = "CAPTURE")]
    output_file: Option<PathBuf>,
    /// xdp, tc-ingress or tc-egress [default: the chain's first, or xdp]
    #[arg(long, value_parser = parse_hook)]
    hook: Option<Hook>,
    #[command(flatten)]
    output: Output,
}

#[derive(Subcommand)]
enum SetCommand {
    /// Store elements: member=value,... or JSON; "arg=N" or "chain=NAME" is what actions read
    ///
    /// "expire=30s" has an element count for that long, in whole seconds.
    ///
    /// For example: policy-chain set add windows
    /// local=192.0.2.1,local_port=443,remote=198.51.100.9,remote_port=40000,arg=512
    Add {
        /// Name of the set
        set: String,
        /// Element; its members are on the page of the selector that looks the set up
        #[arg(required = true, value_name = "ELEMENT")]
        elements: Vec<String>,
    },
    /// Remove elements
    Del {
        /// Name of the set
        set: String,
        /// Element; an argument, if given, is not compared
        #[arg(required = true, value_name = "ELEMENT")]
        elements: Vec<String>,
    },
    /// List the sets, or the elements of one
    List {
        /// Name of a set
        set: Option<String>,
        #[command(flatten)]
        output: Output,
    },
    /// Store the elements of a file: a JSON list, or one element a line
    Load {
        /// Name of the set
        set: String,
        /// File, or - for standard input
        file: PathBuf,
        /// Then remove the elements the file does not have
        #[arg(long)]
        replace: bool,
    },
    /// Take a set away that no chain uses
    Delete {
        /// Name of the set
        set: String,
    },
}

#[derive(Subcommand)]
enum TestbedCommand {
    /// Make namespaces joined by veth pairs: client and server, with a router or a delay between if
    /// asked
    Up(Up),
    /// Change the delay of a path of a testbed that was made with one
    Set {
        /// Name of the testbed
        name: String,
        /// Number of the path, from 1
        #[arg(long)]
        path: u8,
        /// Round trip time added to it, in milliseconds
        #[arg(long, value_name = "MS", value_parser = parse_milliseconds)]
        delay: Duration,
    },
    /// Carry the frames of a testbed with delays, until it is removed
    #[command(hide = true)]
    Relay {
        /// Name of the testbed
        name: String,
    },
    /// Run a command in one of its namespaces
    Exec {
        /// Name of the testbed
        name: String,
        /// client, server, router or relay
        role: String,
        /// Program and its arguments
        #[arg(required = true, last = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
    /// Remove it
    Down {
        /// Name of the testbed
        name: String,
    },
    /// List the testbeds
    List {
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Args)]
struct Up {
    /// Name of the testbed
    name: String,
    /// Pairs between them, 1 to 8
    #[arg(long, default_value_t = 1)]
    paths: u8,
    /// Put a router between client and server
    #[arg(long)]
    router: bool,
    /// Have MPTCP use all paths (5 at most): the server announces its addresses (signal), or the
    /// client joins from its own (subflow)
    #[arg(long, value_name = "HOW")]
    mptcp: Option<String>,
    /// Round trip time added to paths, in milliseconds: half of it each way, for all paths, or one a
    /// path (20,5)
    ///
    /// Frames pass a relay, a process in the background that `testbed down` ends. Offloads are off.
    /// Not with --router.
    #[arg(
        long,
        value_name = "MS",
        value_delimiter = ',',
        value_parser = parse_milliseconds,
        conflicts_with = "router"
    )]
    delay: Vec<Duration>,
    /// Limit what client and server send: Mbit/s for all paths, or one a path (100,20)
    #[arg(long, value_name = "MBIT", value_delimiter = ',')]
    rate: Vec<u32>,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Output {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// How soon a command that waits sees that it is interrupted.
const GLANCE: Duration = Duration::from_millis(100);
/// How long a command works without a word.
const PATIENCE: Duration = Duration::from_secs(1);

fn parse_hook(text: &str) -> Result<Hook, String> {
    text.parse().map_err(|()| {
        format!(
            "expected one of {}",
            Hook::ALL.map(hook::Hook::name).join(", ")
        )
    })
}

fn parse_milliseconds(text: &str) -> Result<Duration, String> {
    let number: Option<f64> = text.parse().ok();
    number
        .and_then(|number| Duration::try_from_secs_f64(number / 1e3).ok())
        .ok_or_else(|| "expected milliseconds, such as 20 or 0.5".to_owned())
}

fn parse_time(text: &str) -> Result<Duration, String> {
    let time = policy::parse_duration(text).map(Duration::from_nanos);
    time.ok_or_else(|| "expected a whole number and h, m, s, ms, us or ns".to_owned())
}

/// Runs a command; the result is its exit code.
///
/// # Errors
/// As the command says.
pub fn run(cli: Cli) -> Result<u8> {
    let folder = &cli.bpffs;
    match cli.command {
        Command::Check { files } => check(&files),
        Command::Apply(arguments) => apply(folder, &arguments),
        Command::List { all_netns, output } => list(folder, all_netns, &output),
        Command::Show { name, output } => show(folder, &name, &output),
        Command::Delete {
            names,
            all,
            all_netns,
            force,
        } => {
            if all {
                return delete(folder, |store| apply::delete_all(store, all_netns));
            }
            delete(folder, |store| apply::delete(store, &names, force))
        }
        Command::Agent => {
            agent::run(folder, agent::stop_signals()?)?;
            Ok(EXIT_DONE)
        }
        Command::Set { command } => set(folder, command),
        Command::Connections { all, over, output } => connections(folder, all, over, &output),
        Command::Events(arguments) => events(folder, &arguments),
        Command::Policies { name, output } => policies(name.as_deref(), &output),
        Command::Schema => print_json(&spec::schema(Registry::embedded()?)),
        Command::Replay(arguments) => replay(&arguments),
        Command::Testbed { command } => testbed(command),
    }
}

fn check(files: &[PathBuf]) -> Result<u8> {
    let registry = Registry::embedded()?;
    let spec = Spec::read(files, registry)?;
    spec.validate_references(&Default::default(), &Default::default())?;
    plan::check(&spec, registry)?;
    let chains = number(spec.chains.len() as u64, "chain");
    let sets = number(spec.sets.len() as u64, "set");
    print(&format!("ok: {chains}, {sets}\n"))
}

/// `1 chain`, `2 chains`.
fn number(count: u64, thing: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {thing}{plural}")
}

fn apply(folder: &Path, arguments: &Apply) -> Result<u8> {
    let spec = Spec::read(&arguments.files, Registry::embedded()?)?;
    let store = lock(folder)?;
    let start = Instant::now();
    let progress = |loaded: usize, all: usize| {
        if start.elapsed() > PATIENCE && std::io::stderr().is_terminal() {
            // There is nobody left to tell if this fails.
            drop(writeln!(
                std::io::stderr(),
                "loaded {loaded} of {all} nodes"
            ));
        }
    };
    let options = Options {
        prune: arguments.prune,
        dry_run: arguments.dry_run,
        carrier: arguments.carrier.map(CarrierChoice::from),
        progress: Some(&progress),
        keep_programs: false,
    };
    let report = apply::apply(&store, &spec, options);
    if report.is_err() || arguments.dry_run {
        store.remove_if_empty()?;
    }
    let report = report?;
    report.warnings().iter().for_each(|warning| warn(warning));
    print_report(&report, arguments.output.json)
}

fn warn(message: &str) {
    // There is nobody left to tell if this fails.
    drop(writeln!(std::io::stderr(), "warning: {message}"));
}

fn delete(folder: &Path, change: impl Fn(&Store) -> Result<Report>) -> Result<u8> {
    let store = lock(folder)?;
    let report = change(&store);
    if report.is_err() {
        store.remove_if_empty()?;
    }
    let mut report = report?;
    report
        .chains
        .retain(|(_, change)| *change == Change::Remove);
    report
        .attachments
        .retain(|(.., change)| *change != Change::Unchanged);
    print_report(&report, false)
}

/// Takes the lock. From here on an interrupt waits: a change once begun is brought to its end.
fn lock(folder: &Path) -> Result<Store> {
    let store = Store::lock(folder)?;
    agent::on_stop(|| {
        // There is nobody left to tell if this fails.
        drop(writeln!(std::io::stderr(), "finishing the change first"));
    })?;
    Ok(store)
}

fn print_report(report: &Report, json: bool) -> Result<u8> {
    if json {
        return print_json(&report.to_json());
    }
    print(&report.to_string())
}

fn list(folder: &Path, all_netns: bool, output: &Output) -> Result<u8> {
    let views = view::chains(&Store::open(folder)?, all_netns)?;
    if output.json {
        let list: Vec<Value> = views.iter().map(|view| view.to_json().into()).collect();
        return print_json(&list.into());
    }
    print(&view::table(&views))
}

fn show(folder: &Path, name: &str, output: &Output) -> Result<u8> {
    let view = view::chain(&Store::open(folder)?, name)?;
    if output.json {
        return print_json(&view.to_json_with_nodes());
    }
    print(&view.page())
}

fn connections(folder: &Path, all: bool, over: Duration, output: &Output) -> Result<u8> {
    let mut found = connections::read_with_rates(&Store::open(folder)?, over)?;
    found.retain(|connection| all || !connection.is_over());
    if output.json {
        let list: Vec<Value> = found
            .iter()
            .map(|connection| connection.to_json())
            .collect();
        return print_json(&list.into());
    }
    print(&connections::table(&found))
}

fn set(folder: &Path, command: SetCommand) -> Result<u8> {
    match command {
        SetCommand::Add { set, elements } => {
            let store = Store::open(folder)?;
            let set = NamedSet::open(&store, &set)?;
            let items = elements.iter().map(|text| set.parse(text));
            set.add(&items.collect::<Result<Vec<_>, _>>()?)?;
            print(&format!("stored {}\n", elements.len()))
        }
        SetCommand::Del { set, elements } => {
            let store = Store::open(folder)?;
            let set = NamedSet::open(&store, &set)?;
            let items = elements.iter().map(|text| set.parse(text));
            let removed = set.delete(&items.collect::<Result<Vec<_>, _>>()?)?;
            print(&format!("removed {removed} of {}\n", elements.len()))?;
            Ok(if removed == elements.len() {
                EXIT_DONE
            } else {
                EXIT_FAILED
            })
        }
        SetCommand::List { set, output } => list_set(folder, set.as_deref(), &output),
        SetCommand::Load { set, file, replace } => {
            let store = Store::open(folder)?;
            let set = NamedSet::open(&store, &set)?;
            let loaded = set.load(&read(&file)?, &file, replace)?;
            let (stored, removed) = (loaded.stored, loaded.removed);
            print(&format!("stored {stored}, removed {removed}\n"))
        }
        SetCommand::Delete { set } => {
            let store = lock(folder)?;
            let deleted = sets::delete(&store, &set);
            store.remove_if_empty()?;
            deleted?;
            print(&format!("removed {set}\n"))
        }
    }
}

fn read(file: &Path) -> Result<String> {
    if file != Path::new("-") {
        return json::read_text(file);
    }
    let mut text = String::new();
    let mut input = std::io::stdin().lock();
    input
        .read_to_string(&mut text)
        .context("read standard input")?;
    Ok(text)
}

fn list_set(folder: &Path, set: Option<&str>, output: &Output) -> Result<u8> {
    let store = Store::open(folder)?;
    let Some(name) = set else {
        let sets = store.state()?.sets;
        if output.json {
            let list: Vec<Value> = sets
                .iter()
                .map(|(name, set)| {
                    serde_json::json!({ "name": name, "kind": set.kind, "size": set.size })
                })
                .collect();
            return print_json(&list.into());
        }
        let lines = sets
            .iter()
            .map(|(name, set)| format!("{name:<32} {:<10} {:>9}\n", set.kind, set.size));
        return print(&lines.collect::<String>());
    };
    let items = NamedSet::open(&store, name)?.list()?;
    if output.json {
        let list: Vec<Value> = items.into_iter().map(Value::Object).collect();
        return print_json(&list.into());
    }
    let lines = items.iter().map(|item| sets::compact(item) + "\n");
    print(&lines.collect::<String>())
}

fn events(folder: &Path, arguments: &Events) -> Result<u8> {
    if !arguments.wait && monitor::ring::find(folder)?.is_none() {
        return Err(Refused::state(
            "there are no events",
            "no chain of this network namespace has the action `report`",
            "apply a chain with the action `report`, or wait for one: --wait",
        )
        .into());
    }
    let start = Instant::now();
    let interrupted = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&interrupted);
    agent::on_stop(move || flag.store(true, Ordering::Relaxed))?;
    let mut subscription = monitor::Events::subscribe(folder)?;
    let mut missing = arguments.count;
    while missing != Some(0) && !interrupted.load(Ordering::Relaxed) {
        let left = match arguments.timeout {
            Some(timeout) => timeout.saturating_sub(start.elapsed()),
            None => Duration::MAX,
        };
        if left.is_zero() {
            let (Some(missing), Some(count)) = (missing, arguments.count) else {
                return Ok(EXIT_DONE);
            };
            return Err(Refused::state(
                format!("{} of {} came", count - missing, number(count, "event")),
                "the time of --timeout is over",
                "allow more time; `policy-chain list` tells how many packets the chains that \
                 report have seen",
            )
            .into());
        }
        let Some(event) = subscription.receive(Some(left.min(GLANCE)))? else {
            continue;
        };
        let message = Message::from_json(&event);
        match &message {
            Ok(message) if !arguments.output.json => print(&format!("{message}\n"))?,
            // Also what a later version reports.
            _ => print(&format!("{event}\n"))?,
        };
        if !matches!(message, Ok(Message::Lost(_))) {
            missing = missing.map(|missing| missing - 1);
        }
    }
    Ok(EXIT_DONE)
}

fn policies(name: Option<&str>, output: &Output) -> Result<u8> {
    let registry = Registry::embedded()?;
    let Some(name) = name else {
        if output.json {
            return print_json(&policy::policies_json(registry));
        }
        return print(&policy::policies_table(registry));
    };
    let found = registry
        .policies()
        .iter()
        .find(|policy| policy.name == name);
    let policy = found.ok_or_else(|| {
        let names = registry
            .policies()
            .iter()
            .map(|policy| policy.name.as_str());
        let near = policy_chain::error::did_you_mean(name, names);
        Invalid::new("NAME", format!("\"{name}\"{near}"), "the name of a policy")
            .advice("see `policy-chain policies`")
    })?;
    if output.json {
        return print_json(&policy::policy_json(policy));
    }
    print(&policy::policy_page(policy))
}

fn replay(arguments: &Replay) -> Result<u8> {
    let files = std::slice::from_ref(&arguments.file);
    let spec = Spec::read(files, Registry::embedded()?)?;
    spec.validate_references(&Default::default(), &Default::default())?;
    let hook = arguments.hook.unwrap_or_else(|| {
        let mut chains = spec.chains.iter();
        let chain = chains.find(|chain| chain.name == arguments.chain);
        chain.and_then(first_hook).unwrap_or(Hook::Xdp)
    });
    let mut runner = Runner::new(&spec, &arguments.chain, hook, CarrierChoice::Auto)?;
    let mut out = std::io::stdout().lock();
    let json = arguments.output.json;
    let output = arguments.output_file.as_deref();
    replay::capture(
        &mut runner,
        &arguments.input,
        output,
        |number, input, outcome| {
            if json {
                writeln!(out, "{}", outcome.to_json(number, input))?;
            } else {
                writeln!(out, "{}", outcome.line(number, input))?;
            }
            Ok(())
        },
    )?;
    out.flush()?;
    Ok(EXIT_DONE)
}

fn first_hook(chain: &Chain) -> Option<Hook> {
    chain.attach.first().map(|attach| attach.hook)
}

fn testbed(command: TestbedCommand) -> Result<u8> {
    match command {
        TestbedCommand::Up(arguments) => testbed_up(arguments),
        TestbedCommand::Set { name, path, delay } => {
            Testbed::open(&name)?.set_delay(path, delay)?;
            print(&format!("path {path}: {} ms\n", delay.as_secs_f64() * 1e3))
        }
        TestbedCommand::Relay { name } => {
            testbed::run_relay(&name)?;
            Ok(EXIT_DONE)
        }
        TestbedCommand::Exec {
            name,
            role,
            command,
        } => {
            let role: Role = role.parse()?;
            match Testbed::open(&name)?.become_program(role, &command)? {}
        }
        TestbedCommand::Down { name } => {
            testbed::down(&name)?;
            print(&format!("removed {name}\n"))
        }
        TestbedCommand::List { output } => {
            let names = testbed::list()?;
            if output.json {
                return print_json(&names.into());
            }
            print(
                &names
                    .iter()
                    .map(|name| format!("{name}\n"))
                    .collect::<String>(),
            )
        }
    }
}

fn testbed_up(arguments: Up) -> Result<u8> {
    let announce = arguments.mptcp.as_deref().map(str::parse::<Announce>);
    let options = testbed::Options {
        paths: arguments.paths,
        router: arguments.router,
        mptcp: announce.transpose()?,
        delay: arguments.delay,
        rate: arguments.rate,
    };
    let testbed = Testbed::up(&arguments.name, &options)?;
    if !options.delay.is_empty() {
        let started = std::env::current_exe()
            .context("find this program")
            .and_then(|program| testbed.start_relay(&program));
        if let Err(error) = started {
            // Why the relay did not start is what to report.
            if let Err(also) = testbed::down(&arguments.name) {
                let name = &arguments.name;
                warn(&format!(
                    "the testbed {name} could not be removed: {also:#}"
                ));
            }
            return Err(error);
        }
    }
    if arguments.output.json {
        return print_json(&testbed.describe().to_json());
    }
    print(&format!("{}\n", testbed.describe()))
}

fn print(text: &str) -> Result<u8> {
    let mut out = std::io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(EXIT_DONE)
}

fn print_json(value: &Value) -> Result<u8> {
    print(&format!("{value:#}\n"))
}
