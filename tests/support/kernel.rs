//! The eBPF programs and their maps, loaded without an interface.

use std::collections::BTreeMap;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::time::Duration;

use aya::maps::{Array, HashMap, MapData, PerCpuArray, RingBuf};
use aya::programs::{Program, SchedClassifier, TcAttachType, TestRun, TestRunOptions, Xdp};
use aya::{Ebpf, EbpfLoader};
use common::counter::Counter;
use common::event::{Kind, UNFINISHED_FRAME_BYTES};
use common::maps::{
    BridgeNumber, Listener, ListenerKey, Managed, ManagedKey, Origins, Port, PortUsage, Querier,
    QuerierKey, RelayFlowEntry, RelayFlowKey, Source, SourceKey, StreamKey,
};
use common::trace::Filter;
use roamcast::datapath::object;
use roamcast::proto::Stream;

/// Verdict "continue", `TC_ACT_UNSPEC`.
pub const PASS: i32 = -1;
/// Verdict "drop", `TC_ACT_SHOT`.
pub const SHOT: i32 = 2;
/// Interface on which program test-run lets a frame arrive: the loopback.
pub const IFINDEX: u32 = 1;
/// Offset of the mark in `struct __sk_buff`.
const MARK: std::ops::Range<usize> = 8..12;
/// Offset of the mark, for [`Kernel::run_in`].
pub const CONTEXT_MARK: usize = MARK.start;
/// Offset of the interface index in `struct __sk_buff`.
pub const CONTEXT_IFINDEX: usize = 40;
/// Offset of the number of packets that the frame aggregates.
pub const CONTEXT_SEGMENTS: usize = 164;
/// Offset of the size of these packets.
pub const CONTEXT_SEGMENT_BYTES: usize = 176;
/// `sizeof(struct __sk_buff)`.
const SKB_BYTES: usize = 192;

/// All programs, newly loaded, with one port that has generous limits.
pub struct Kernel {
    ebpf: Ebpf,
}

impl Kernel {
    /// Loads the programs; prints the reason and returns `None` if the system does not permit it.
    pub fn load() -> Option<Self> {
        Self::load_with(&[])
    }

    /// Like [`Self::load`], with other map capacities.
    pub fn load_with(capacities: &[(&'static str, u32)]) -> Option<Self> {
        Self::load_object(object::HOST, capacities)
    }

    /// Loads the traced programs, with a filter that reports nothing yet.
    pub fn load_traced() -> Option<Self> {
        let mut kernel = Self::load_object(object::HOST_TRACED, &[])?;
        kernel.set_array("TRACE_FILTER", 0, Filter::NOTHING);
        Some(kernel)
    }

    /// Loads the traced programs, with a filter that examines every decision and passes none.
    pub fn load_traced_in_vain() -> Option<Self> {
        let mut kernel = Self::load_traced()?;
        let filter = Filter {
            address: common::testing::frame::address("2001:db8:ffff::ffff"),
            ..Filter::everything(1000)
        };
        kernel.set_array("TRACE_FILTER", 0, filter);
        Some(kernel)
    }

    fn load_object(object: &[u8], capacities: &[(&'static str, u32)]) -> Option<Self> {
        let mut loader = EbpfLoader::new();
        let cpus = aya::util::nr_cpus().unwrap().try_into().unwrap();
        loader.map_max_entries("HELD_SCRATCH", cpus);
        loader.override_global("BRIDGE", &BridgeNumber::FIRST, true);
        for (map, entries) in capacities {
            loader.map_max_entries(map, *entries);
        }
        let mut ebpf = match loader.load(object) {
            Ok(ebpf) => ebpf,
            Err(error) if std::env::var_os("CI").is_none() && !nix::unistd::geteuid().is_root() => {
                eprintln!("Skipped, BPF is not permitted: {error}");
                return None;
            }
            Err(error) => panic!("Cannot load the maps: {error:?}"),
        };
        for name in ["snoop", "gate", "uplink", "leak", "replicate"] {
            program(&mut ebpf, name)
                .load()
                .unwrap_or_else(|error| panic!("Cannot load {name}: {error:?}"));
        }
        let xdp: &mut Xdp = ebpf.program_mut("uplink_xdp").unwrap().try_into().unwrap();
        xdp.load()
            .unwrap_or_else(|error| panic!("Cannot load uplink_xdp: {error:?}"));
        let mut kernel = Self { ebpf };
        kernel.limit(100_000, 100_000, 1_000_000);
        Some(kernel)
    }

    /// Returns the instructions that the verifier has walked, by program.
    pub fn verified_instructions(&self) -> Vec<(String, u32)> {
        self.ebpf
            .programs()
            .map(|(name, program)| {
                let info = program.info().unwrap();
                (
                    name.to_owned(),
                    info.verified_instruction_count().unwrap_or(0),
                )
            })
            .collect()
    }

    /// Returns the bytes of instructions after verification, by program.
    pub fn translated_bytes(&self) -> BTreeMap<String, u32> {
        self.ebpf
            .programs()
            .map(|(name, program)| {
                let bytes = program.info().unwrap().size_translated().unwrap();
                (name.to_owned(), bytes)
            })
            .collect()
    }

    /// Whether the object has a map of this name.
    pub fn has_map(&self, name: &str) -> bool {
        self.ebpf.map(name).is_some()
    }

    /// Sets the limits of the port.
    pub fn limit(&mut self, listeners: u32, sources: u32, reports_per_second: u32) {
        self.limit_port(IFINDEX, listeners, sources, reports_per_second);
    }

    /// Sets the limits of the port with this index.
    pub fn limit_port(
        &mut self,
        ifindex: u32,
        listeners: u32,
        sources: u32,
        reports_per_second: u32,
    ) {
        let port = Port {
            max_listeners: listeners,
            max_sources: sources,
            reports_per_second,
            datagrams_per_second: 50,
            max_flows: 4096,
            ..Port::default()
        };
        self.map::<u32, Port>("PORTS")
            .insert(ifindex, port, 0)
            .unwrap();
    }

    /// Removes the port.
    pub fn forget_port(&mut self) {
        self.map::<u32, Port>("PORTS").remove(&IFINDEX).unwrap();
    }

    /// Watches an address for packets from a time on.
    pub fn manage(&mut self, address: &str, watch_since_ns: u64) {
        self.manage_as(address, watch_since_ns, Origins::Native);
    }

    /// Watches an address that may have at most this many flows.
    pub fn manage_with(&mut self, address: &str, max_flows: u16) {
        self.manage_value(address, Managed::new(0, Origins::Native, max_flows));
    }

    /// Watches an address for packets from a time on, with the origins that pass.
    pub fn manage_as(&mut self, address: &str, watch_since_ns: u64, origins: Origins) {
        self.manage_value(address, Managed::new(watch_since_ns, origins, u16::MAX));
    }

    fn manage_value(&mut self, address: &str, value: Managed) {
        let key = ManagedKey {
            vlan: 0,
            bridge: BridgeNumber::FIRST,
            multicast_address: common::testing::frame::address(address),
        };
        self.map("MANAGED").insert(key, value, 0).unwrap();
    }

    /// Runs `snoop`; returns the verdict.
    pub fn snoop(&mut self, frame: &[u8]) -> i32 {
        self.run("snoop", frame).0
    }

    /// Runs `snoop`; returns the verdict and the resulting mark of the frame.
    pub fn snoop_mark(&mut self, frame: &[u8]) -> (i32, u32) {
        self.run("snoop", frame)
    }

    /// Runs `uplink`; returns the verdict.
    pub fn uplink(&mut self, frame: &[u8]) -> i32 {
        self.run("uplink", frame).0
    }

    /// Runs `snoop` on a frame repeatedly; returns the total time.
    pub fn snoop_repeatedly(&mut self, frame: &[u8], repeat: u32) -> Duration {
        self.repeatedly("snoop", frame, repeat)
    }

    /// Runs a program on a frame repeatedly; returns the total time.
    pub fn repeatedly(&mut self, name: &str, frame: &[u8], repeat: u32) -> Duration {
        let options = TestRunOptions {
            data_in: Some(frame),
            repeat,
            ..TestRunOptions::new()
        };
        self.test_run(name, options).duration * repeat
    }

    /// Runs a program; returns its result and the resulting frame.
    pub fn run_frame(&mut self, name: &str, frame: &[u8]) -> (i32, Vec<u8>) {
        let mut out = vec![0; frame.len()];
        let options = TestRunOptions {
            data_in: Some(frame),
            data_out: Some(&mut out),
            ..TestRunOptions::new()
        };
        let result = self.test_run(name, options);
        assert_eq!(result.data_size_out as usize, frame.len());
        (result.return_value.cast_signed(), out)
    }

    /// Runs a program on a frame with these context fields; returns its result.
    pub fn run_in(&mut self, name: &str, frame: &[u8], context: &[(usize, u32)]) -> i32 {
        let mut bytes = [0; SKB_BYTES];
        for (offset, value) in context {
            bytes[*offset..*offset + 4].copy_from_slice(&value.to_ne_bytes());
        }
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&bytes),
            ..TestRunOptions::new()
        };
        self.test_run(name, options).return_value.cast_signed()
    }

    fn test_run(
        &mut self,
        name: &str,
        options: TestRunOptions<'_>,
    ) -> aya::programs::TestRunResult {
        match self.ebpf.program_mut(name).unwrap() {
            Program::Xdp(xdp) => xdp.test_run(options),
            Program::SchedClassifier(classifier) => classifier.test_run(options),
            program => panic!("{program:?} is not run here"),
        }
        .unwrap_or_else(|error| panic!("Cannot run {name}: {error:?}"))
    }

    /// Returns the descriptor of a program.
    pub fn program_fd(&mut self, name: &str) -> std::os::fd::RawFd {
        program(&mut self.ebpf, name)
            .fd()
            .unwrap()
            .as_fd()
            .as_raw_fd()
    }

    /// Writes an entry of a hash map.
    pub fn insert<K: aya::Pod, V: aya::Pod>(&mut self, map: &str, key: K, value: V) {
        self.map(map).insert(key, value, 0).unwrap();
    }

    /// Writes an element of an array.
    pub fn set_array<V: aya::Pod>(&mut self, map: &str, index: u32, value: V) {
        let map = self.ebpf.map_mut(map).unwrap();
        let mut array: Array<&mut MapData, V> = map.try_into().unwrap();
        array.set(index, value, 0).unwrap();
    }

    /// Removes all entries of a hash map.
    pub fn clear<K: aya::Pod, V: aya::Pod>(&mut self, map: &str) {
        for (key, _) in self.read::<K, V>(map) {
            self.map::<K, V>(map).remove(&key).unwrap();
        }
    }

    /// Attaches `snoop` to an interface of the current network namespace.
    pub fn attach_snoop(&mut self, interface: &str) {
        program(&mut self.ebpf, "snoop")
            .attach(interface, TcAttachType::Ingress)
            .unwrap();
    }

    /// Returns the memory that the kernel accounts to a map, bytes.
    pub fn memory(&self, map: &str) -> u64 {
        let aya::maps::Map::HashMap(data) = self.ebpf.map(map).unwrap() else {
            panic!("{map} is not a hash map");
        };
        let fd = data.fd().as_fd().as_raw_fd();
        let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{fd}")).unwrap();
        let line = text.lines().find_map(|line| line.strip_prefix("memlock:"));
        line.and_then(|bytes| bytes.trim().parse().ok())
            .unwrap_or(0)
    }

    /// Writes a listener into the map as the program would.
    pub fn insert_listener(&mut self, key: ListenerKey, value: Listener) {
        self.map("LISTENERS").insert(key, value, 0).unwrap();
    }

    /// Returns the entries of `LISTENERS`.
    pub fn listeners(&mut self) -> Vec<(ListenerKey, Listener)> {
        self.read("LISTENERS")
    }

    /// Returns the entries of `LISTENER_SOURCES`.
    pub fn sources(&mut self) -> Vec<(SourceKey, Source)> {
        self.read("LISTENER_SOURCES")
    }

    /// Returns `STREAMS`, merged with the usage in `RELAY_FLOWS`.
    pub fn streams(&mut self) -> Vec<(StreamKey, Stream)> {
        let mut streams: BTreeMap<StreamKey, Stream> = BTreeMap::new();
        for (key, usage) in self.read("STREAMS") {
            streams.entry(key).or_default().native = usage;
        }
        for (_, entry) in self.read::<RelayFlowKey, RelayFlowEntry>("RELAY_FLOWS") {
            if entry.usage.packets > 0 {
                streams.entry(entry.flow.stream).or_default().relay = entry.usage;
            }
        }
        streams.into_iter().collect()
    }

    /// Returns the entries of `QUERIER`.
    pub fn queriers(&mut self) -> Vec<(QuerierKey, Querier)> {
        self.read("QUERIER")
    }

    /// Returns `PORT_USAGE` of the port.
    pub fn usage(&mut self) -> PortUsage {
        self.usage_of(IFINDEX)
    }

    /// Returns `PORT_USAGE` of the port with this index.
    pub fn usage_of(&mut self, ifindex: u32) -> PortUsage {
        self.map::<u32, PortUsage>("PORT_USAGE")
            .get(&ifindex, 0)
            .unwrap()
    }

    /// Returns one counter, summed over the CPUs.
    pub fn counter(&mut self, counter: Counter) -> u64 {
        let map = self.ebpf.map("COUNTERS").unwrap();
        let counters = PerCpuArray::<_, u64>::try_from(map).unwrap();
        counters.get(&(counter as u32), 0).unwrap().iter().sum()
    }

    /// Returns the first entry of a per-CPU array, one value per CPU.
    pub fn per_cpu<V: aya::Pod>(&mut self, map: &str) -> Vec<V> {
        let array = PerCpuArray::<_, V>::try_from(self.ebpf.map(map).unwrap()).unwrap();
        array.get(&0, 0).unwrap().iter().copied().collect()
    }

    /// Returns all counters that are not zero.
    pub fn counted(&mut self) -> Vec<(Counter, u64)> {
        Counter::ALL
            .iter()
            .map(|counter| (*counter, self.counter(*counter)))
            .filter(|(_, count)| *count > 0)
            .collect()
    }

    /// Takes the waiting events; returns their kinds.
    pub fn events(&mut self) -> Vec<u32> {
        self.records().iter().map(|record| kind(record)).collect()
    }

    /// Takes the waiting events; returns the frames of unfinished Reports.
    pub fn unfinished_reports(&mut self) -> Vec<Vec<u8>> {
        self.records()
            .iter()
            .filter(|record| kind(record) == Kind::Unfinished as u32)
            .map(|record| {
                let length = u32::from_ne_bytes(record[20..24].try_into().unwrap()) as usize;
                assert_eq!(record.len(), 24 + UNFINISHED_FRAME_BYTES);
                record[24..24 + length].to_vec()
            })
            .collect()
    }

    fn records(&mut self) -> Vec<Vec<u8>> {
        self.ring("EVENTS")
    }

    /// Takes the waiting records of a ring buffer.
    pub fn ring(&mut self, map: &str) -> Vec<Vec<u8>> {
        let map = self.ebpf.map_mut(map).unwrap();
        let mut ring = RingBuf::try_from(map).unwrap();
        let mut records = Vec::new();
        while let Some(record) = ring.next() {
            records.push(record.to_vec());
        }
        records
    }

    fn run(&mut self, name: &str, frame: &[u8]) -> (i32, u32) {
        let mut context = [0; SKB_BYTES];
        let context_in = context;
        let options = TestRunOptions {
            data_in: Some(frame),
            ctx_in: Some(&context_in),
            ctx_out: Some(&mut context),
            ..TestRunOptions::new()
        };
        let result = program(&mut self.ebpf, name)
            .test_run(options)
            .unwrap_or_else(|error| panic!("Cannot run {name}: {error:?}"));
        let mark = u32::from_ne_bytes(context[MARK].try_into().unwrap());
        (result.return_value.cast_signed(), mark)
    }

    /// Moves a map out, for use on another thread.
    pub fn take_map(&mut self, name: &str) -> aya::maps::Map {
        self.ebpf.take_map(name).unwrap()
    }

    /// Returns one entry of a hash map.
    pub fn entry<K: aya::Pod, V: aya::Pod>(&mut self, map: &str, key: K) -> Option<V> {
        self.map(map).get(&key, 0).ok()
    }

    /// Removes an entry of a hash map.
    pub fn remove<K: aya::Pod, V: aya::Pod>(&mut self, map: &str, key: K) {
        self.map::<K, V>(map).remove(&key).unwrap();
    }

    /// Returns the first entries of an array.
    pub fn array<V: aya::Pod>(&mut self, map: &str, count: u32) -> Vec<V> {
        let array: Array<_, V> = self.ebpf.map(map).unwrap().try_into().unwrap();
        (0..count)
            .map(|index| array.get(&index, 0).unwrap())
            .collect()
    }

    fn map<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> HashMap<&mut MapData, K, V> {
        HashMap::try_from(self.ebpf.map_mut(name).unwrap()).unwrap()
    }

    /// Returns all entries of a hash map.
    pub fn read<K: aya::Pod, V: aya::Pod>(&mut self, name: &str) -> Vec<(K, V)> {
        self.map(name).iter().map(Result::unwrap).collect()
    }
}

fn kind(record: &[u8]) -> u32 {
    u32::from_ne_bytes(record[..4].try_into().unwrap())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &str) -> &'a mut SchedClassifier {
    ebpf.program_mut(name).unwrap().try_into().unwrap()
}
