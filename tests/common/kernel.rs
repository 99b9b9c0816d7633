// SPDX-License-Identifier: MIT OR Apache-2.0
//! Which kernel objects a bpffs folder keeps alive, and which of them still live.

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::Path;

use policy_chain::engine::sys::{self, MapType};

/// Ids of programs, maps and links. The kernel does not give an id again before it has counted
/// through all of them.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Objects {
    pub programs: BTreeSet<u32>,
    pub maps: BTreeSet<u32>,
    pub links: BTreeSet<u32>,
}

impl Objects {
    /// Everything pinned below `folder`, and everything that uses or is used by it.
    pub fn below(folder: &Path) -> Objects {
        let mut objects = Objects::default();
        objects.add_folder(folder);
        objects
    }

    fn add_folder(&mut self, folder: &Path) {
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.path().is_dir() {
                self.add_folder(&entry.path());
                continue;
            }
            // A pin may go while we look.
            if let Ok(object) = sys::open_pin(&entry.path()) {
                self.add(&object);
            }
        }
    }

    fn add(&mut self, object: &OwnedFd) {
        if let Ok(info) = sys::prog_info(object) {
            assert!(info.name.starts_with("pc_"), "program {}", info.name);
            self.programs.insert(info.id);
            for map in info.map_ids {
                let info = sys::map_by_id(map).and_then(sys::map_info);
                if let Ok(info) = info {
                    assert!(is_ours(&info.name), "map {}", info.name);
                }
                self.maps.insert(map);
            }
        } else if let Ok(info) = sys::link_info(object) {
            self.links.insert(info.id);
        } else if let Ok(info) = sys::map_info(object) {
            assert!(is_ours(&info.name), "map {}", info.name);
            self.maps.insert(info.id);
            if info.kind == MapType::ProgArray {
                for (_, program) in programs_of(object) {
                    if let Ok(program) = sys::prog_by_id(program) {
                        self.add(&program);
                    }
                }
            }
        }
    }

    pub fn extend(&mut self, other: &Objects) {
        self.programs.extend(&other.programs);
        self.maps.extend(&other.maps);
        self.links.extend(&other.links);
    }

    /// Those that are still there. Only ids are asked for: to open a PROG_ARRAY that is just being
    /// released makes the kernel release it twice, and lose count of its references.
    pub fn alive(&self) -> Objects {
        Objects {
            programs: both(&self.programs, sys::programs()),
            maps: both(&self.maps, sys::maps()),
            links: both(&self.links, sys::links()),
        }
    }

    pub fn is_empty(&self) -> bool {
        self.programs.is_empty() && self.maps.is_empty() && self.links.is_empty()
    }

    pub fn len(&self) -> usize {
        self.programs.len() + self.maps.len() + self.links.len()
    }
}

/// `pcd_` and `pcn_` are maps that are kept a device, and a namespace.
fn is_ours(map: &str) -> bool {
    let prefixes = ["pc_", "pcd_", "pcn_"];
    prefixes.iter().any(|prefix| map.starts_with(prefix))
}

fn both(ids: &BTreeSet<u32>, living: sys::Ids) -> BTreeSet<u32> {
    let living: BTreeSet<u32> = living.map(Result::unwrap).collect();
    ids & &living
}

/// Slots and program ids of a PROG_ARRAY.
pub fn programs_of(array: &OwnedFd) -> Vec<(u32, u32)> {
    let slots = sys::map_info(array).unwrap().max_entries;
    (0..slots)
        .filter_map(|slot| {
            let value = sys::map_lookup(array, &slot.to_ne_bytes(), 4).unwrap()?;
            Some((slot, u32::from_ne_bytes(value.try_into().unwrap())))
        })
        .collect()
}
