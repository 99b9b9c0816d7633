// SPDX-License-Identifier: MIT OR Apache-2.0
//! A path for each application: connections to a service use the path it was given as long as it
//! works, the other paths are their backup. Tells of subflows as they come and change.
//!
//! ```text
//! service_paths [--bpffs DIR] --paths DEVICE,DEVICE,... SERVICE=DEVICE...
//! service_paths --paths wlan0,wwan0 https=wlan0 5201=wwan0
//! ```
//!
//! How: on every path but its own, packets of the service's subflows get an MP_PRIO option, once in
//! each direction. Chains go when it ends.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use policy_chain::agent::{self, Failures, inject::Injector};
use policy_chain::engine::apply::{self, Options};
use policy_chain::engine::store::{DEFAULT_FOLDER, Store};
use policy_chain::monitor::{Events, Message};
use policy_chain::policy::Registry;
use policy_chain::spec::Spec;
use serde_json::{Value, json};

const USAGE: &str =
    "usage: service_paths [--bpffs DIR] --paths DEVICE,DEVICE,... SERVICE=DEVICE...";

#[allow(dead_code)] // of a test that includes this file
fn main() -> Result<()> {
    let mut folder = PathBuf::from(DEFAULT_FOLDER);
    let mut paths = Vec::new();
    let mut services = BTreeMap::new();
    let mut arguments = std::env::args().skip(1);
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--bpffs" => folder = arguments.next().context(USAGE)?.into(),
            "--paths" => {
                let list = arguments.next().context(USAGE)?;
                paths = list.split(',').map(str::to_owned).collect();
            }
            _ => {
                let (service, device) = argument.split_once('=').context(USAGE)?;
                services.insert(service.to_owned(), device.to_owned());
            }
        }
    }
    let stop = Arc::new(AtomicBool::new(false));
    let flag = Arc::clone(&stop);
    agent::on_stop(move || flag.store(true, Ordering::Relaxed))?;
    run(&folder, &paths, &services, &stop)
}

/// Keeps the services on their paths until told to stop.
pub fn run(
    folder: &Path,
    paths: &[String],
    services: &BTreeMap<String, String>,
    stop: &AtomicBool,
) -> Result<()> {
    let spec = chains(paths, services)?;
    apply::apply(&Store::lock(folder)?, &spec, Options::default())?;
    let result = follow(folder, stop);
    let names: Vec<String> = spec.chains.iter().map(|chain| chain.name.clone()).collect();
    apply::delete(&Store::lock(folder)?, &names, false)?;
    result
}

/// Prints what happens to the subflows, and wakes those that wait for a packet with room.
fn follow(folder: &Path, stop: &AtomicBool) -> Result<()> {
    let mut events = Events::subscribe(folder)?;
    let mut injector = Injector::new(folder);
    let mut failures = Failures::default();
    while !stop.load(Ordering::Relaxed) {
        // A path that cannot be woken is no reason to leave the others alone.
        if let Err(error) = injector.look(&Store::open(folder)?) {
            failures.say(&format!("{error:#}"));
        }
        if let Some(event) = events.receive(Some(Duration::from_millis(200)))? {
            println!("{}", Message::from_json(&event)?);
        }
    }
    Ok(())
}

fn chains(paths: &[String], services: &BTreeMap<String, String>) -> Result<Spec> {
    if paths.len() < 2 || services.is_empty() {
        bail!("{USAGE}");
    }
    let both = |device: &String| {
        ["tc-ingress", "tc-egress"].map(|hook| json!({ "device": device, "hook": hook }))
    };
    let observed: Vec<Value> = paths.iter().flat_map(both).collect();
    let mut chains = vec![json!({
        "name": "service-paths",
        "attach": observed,
        "priority": 10,
        "actions": [ { "action": "record" }, { "action": "report" } ],
        "then": "continue"
    })];
    for (number, (service, path)) in services.iter().enumerate() {
        if !paths.contains(path) {
            bail!("{path}, the path of {service}, is none of --paths");
        }
        let others: Vec<Value> = paths
            .iter()
            .filter(|it| *it != path)
            .flat_map(both)
            .collect();
        // A number is a port, all else the name of a service.
        let port = service
            .parse::<u16>()
            .map_or(json!(service), |port| json!(port));
        chains.push(json!({
            "name": format!("service-path-{number}"),
            "attach": others,
            "selectors": [ { "selector": "service", "port": port, "protocol": "tcp" } ],
            "actions": [ { "action": "mp_prio", "backup": true } ],
            "then": "continue"
        }));
    }
    let file = json!({ "version": 1, "chains": chains });
    Ok(Spec::parse(
        &file.to_string(),
        "service_paths".as_ref(),
        Registry::embedded()?,
    )?)
}
