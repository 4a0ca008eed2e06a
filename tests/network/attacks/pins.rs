//! A local user creates the pin directory before the agent, so that the kernel programs would read
//! that user's maps; and pinned maps with arbitrary contents.

use std::fs::{self, DirBuilder, Permissions};
use std::mem::size_of;
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;

use aya::maps::{HashMap, Map, MapData};
use common::maps::*;
use roamcast::datapath::{Datapath, DatapathConfig, DatapathError};
use support::agent::{Agent, Files, domain};
use support::host::{any_source, config, group, join, listeners};
use support::netns::{Namespace, privileged, wait_for};
use support::tap::Guest;

const NOBODY: u32 = 65_534;

#[test]
fn folders_of_others_are_not_used_for_pins() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.run_with_bpffs(|bpffs: &Path| {
        let config = DatapathConfig {
            pin_root: bpffs.join("roamcast"),
            ..config(bpffs)
        };
        let root = &config.pin_root;
        let version = format!("v{}", common::maps::LAYOUT_VERSION);
        let others = |path: &Path| chown(path, Some(NOBODY), None).unwrap();
        let writable =
            |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        let make = |path: &Path| {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .unwrap();
        };
        let places = [
            root.clone(),
            root.join(&version),
            root.join(&version).join("links"),
        ];
        for place in &places {
            for spoil in [&others as &dyn Fn(&Path), &writable] {
                make(place);
                spoil(place);
                let refused = Datapath::load(&config).err();
                let Some(error @ DatapathError::PinsOfOthers { .. }) = refused else {
                    panic!("{}: {refused:?}", place.display());
                };
                let text = error.to_string();
                assert!(text.contains(&place.display().to_string()), "{text}");
                fs::remove_dir_all(root).unwrap();
            }
        }
        make(&bpffs.join("elsewhere"));
        symlink(bpffs.join("elsewhere"), root).unwrap();
        assert!(matches!(
            Datapath::load(&config).err(),
            Some(DatapathError::PinsOfOthers { .. })
        ));
        fs::remove_file(root).unwrap();
        Datapath::load(&config).unwrap();
        let mode = fs::metadata(root).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    });
}

/// Entries per map.
const ENTRIES: usize = 40;
/// Agent starts, each with other contents.
const LIVES: u16 = 4;

/// Generator of random bytes.
struct Noise(u64);

impl Noise {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    /// Returns mostly small numbers, some of them interface indexes, and some values with all bits
    /// set.
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        std::array::from_fn(|_| match self.next() % 8 {
            0 => self.next() as u8,
            1 => 0xff,
            _ => (self.next() % 4) as u8,
        })
    }
}

/// Fills a pinned map with keys and values of these sizes.
fn fill<const K: usize, const V: usize>(maps: &Path, name: &str, noise: &mut Noise) {
    let map = MapData::from_pin(maps.join(name)).unwrap();
    let is_lru = map.info().unwrap().map_type().unwrap() == aya::maps::MapType::LruHash;
    let mut map = if is_lru {
        Map::LruHashMap(map)
    } else {
        Map::HashMap(map)
    };
    let mut map: HashMap<&mut MapData, [u8; K], [u8; V]> = (&mut map).try_into().unwrap();
    for _ in 0..ENTRIES {
        map.insert(noise.bytes(), noise.bytes(), 0).unwrap();
    }
}

macro_rules! fill_all {
    ($maps:expr, $noise:expr, $($name:literal: $key:ty => $value:ty,)*) => {
        $(fill::<{ size_of::<$key>() }, { size_of::<$value>() }>($maps, $name, $noise);)*
    };
}

fn fill_maps(maps: &Path, noise: &mut Noise) {
    fill_all!(maps, noise,
        "LISTENERS": ListenerKey => Listener,
        "LISTENER_SOURCES": SourceKey => Source,
        "MANAGED": ManagedKey => Managed,
        "STREAMS": StreamKey => StreamUsage,
        "QUERIER": QuerierKey => Querier,
        "RELAY_FLOWS": RelayFlowKey => RelayFlowEntry,
        "RELAYS": RelayKey => u32,
        "FORWARDS": ForwardKey => Forward,
        "TRANSLATIONS": TranslationKey => Translation,
        "PORTS": PortKey => Port,
        "PORT_USAGE": PortKey => PortUsage,
        "GATES": PortKey => Gate,
        "GATE_USAGE": PortKey => GateUsage,
        "DELIVERED": DeliveredKey => Delivered,
    );
}

#[test]
fn agent_that_finds_anything_in_its_maps_starts_and_works() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "tap0", 0);
    host.run_with_bpffs(|bpffs: &Path| {
        let domains = [domain("tv-1", 1, "tap0", [0x52, 0x54, 0, 0, 0, 1])];
        let files = Files::new(bpffs, &domains, "");
        let maps = bpffs.join(format!("roamcast/v{LAYOUT_VERSION}"));
        let is_known = |number| {
            let rows = files.query("listeners")?;
            let mut rows = rows.as_array()?.iter();
            let wanted = group(number).to_string();
            rows.any(|row| row["multicast_address"] == *wanted && row["port"] == "tap0")
                .then_some(())
        };
        let mut sockets = listeners(&guest);
        for life in 0..LIVES {
            if life > 0 {
                fill_maps(&maps, &mut Noise(life.into()));
            }
            let mut agent = Agent::start_with(&files, files.log_file());
            wait_for("the programs of the port", || {
                let ended = agent.child.try_wait().unwrap();
                assert!(ended.is_none(), "{ended:?}: {}", agent.log());
                let status = files.status()?;
                (!status["ports"][0]["hooks"].as_array()?.is_empty()).then_some(())
            });
            // Joins of this life and of the earlier ones.
            join(&guest, &mut sockets, &any_source(life + 1));
            for number in 1..=life + 1 {
                wait_for("a listener", || is_known(number));
            }
            for table in ["status", "streams", "relays", "migrations"] {
                assert!(files.query(table).is_some(), "{table}: {}", agent.log());
            }
            let log = agent.log();
            assert!(!log.contains("panicked"), "{log}");
        }
    });
}
