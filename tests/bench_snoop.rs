//! Cost of `snoop`: time per Report by program test-run, Reports per second through a real TAP,
//! memory and reading time with a full listener table, and the time of `roamcast listeners --json`
//! with a running agent and a full table.
//!
//! `--report FILE` also writes the numbers as JSON.

#![allow(unsafe_code, reason = "a TAP is made by an ioctl")]
#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a bench that can't run has to stop"
)]

use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use common::maps::{BridgeNumber, FilterMode, Listener, ListenerKey};
use common::testing::frame::{self, Frame, record};
use lab::scenario::Testbed;
use lab::scenario::agents::AgentOptions;
use lab::{LabConfig, wait};
use serde::Serialize;
use support::kernel::Kernel;

const RUNS: u32 = 200_000;
/// Events that fit into the ring buffer, so that no run meets a full buffer.
const EVENTS: u32 = 12_000;
const PORTS: u32 = 64;
const ADDRESSES: u32 = 1000;
const TAP_SECONDS: u64 = 2;
/// Records per Report that fit into a frame.
const RECORDS: u32 = 50;
/// Timeout for an agent to attach to all TAPs and to process all Reports.
const TAKEN_IN: Duration = Duration::from_secs(60);
/// Runs of the command; the median counts.
const COMMANDS: usize = 5;

/// Results of one bench run.
#[derive(Serialize)]
struct Results {
    kernel: String,
    reports: Vec<ReportCost>,
    tap_reports_per_second: u64,
    host: HostCost,
}

/// Cost of one kind of Report.
#[derive(Serialize)]
struct ReportCost {
    name: &'static str,
    records: u32,
    frame_bytes: usize,
    /// Mean time of a Report that refreshes its listeners and raises one event per listener,
    /// nanoseconds.
    ns_per_report: u64,
    /// The same for the traced program, with a filter that matches nothing.
    traced_ns_per_report: u64,
}

/// Cost of a full listener table.
#[derive(Serialize)]
struct HostCost {
    ports: u32,
    addresses_per_port: u32,
    memory_bytes: u64,
    read_ms: f64,
    /// Median run time of `roamcast listeners --json`, milliseconds.
    command_ms: f64,
}

fn main() {
    // SAFETY: no thread has been started, and the namespace is this process's own.
    assert_eq!(
        unsafe { libc::unshare(libc::CLONE_NEWNET) },
        0,
        "Needs root"
    );
    ip(&["link", "set", "lo", "up"]);
    let results = Results {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap()
            .trim()
            .to_owned(),
        reports: reports(),
        tap_reports_per_second: tap(),
        host: host(),
    };
    println!(
        "{:<24} {:>8} {:>12} {:>14} {:>7}",
        "Report", "records", "frame bytes", "ns per Report", "traced"
    );
    for cost in &results.reports {
        println!(
            "{:<24} {:>8} {:>12} {:>14} {:>7}",
            cost.name,
            cost.records,
            cost.frame_bytes,
            cost.ns_per_report,
            cost.traced_ns_per_report
        );
    }
    println!(
        "Through a TAP: {} Reports/s",
        results.tap_reports_per_second
    );
    let host = &results.host;
    println!(
        "{} ports of {} addresses: {} KiB, read in {:.1} ms; roamcast listeners --json takes {:.1} ms",
        host.ports,
        host.addresses_per_port,
        host.memory_bytes / 1024,
        host.read_ms,
        host.command_ms
    );
    let mut arguments = std::env::args().skip_while(|argument| argument != "--report");
    if let Some(file) = arguments.nth(1) {
        let json = serde_json::to_string_pretty(&results).unwrap();
        File::create(file)
            .unwrap()
            .write_all(json.as_bytes())
            .unwrap();
    }
}

fn reports() -> Vec<ReportCost> {
    let mut both = [Kernel::load(), Kernel::load_traced_in_vain()]
        .map(|kernel| kernel.unwrap_or_else(|| panic!("Needs root")));
    for kernel in &mut both {
        kernel.limit(100_000, 100_000, u32::MAX);
    }
    let v2 = |count: u32| {
        let records: Vec<_> = (0..count)
            .map(|i| record(2, &format!("ff1e::{i:x}"), &[]))
            .collect();
        Frame::report(&records).bytes()
    };
    [
        ("MLDv1", 1, Frame::v1(131, "ff1e::1").bytes()),
        ("MLDv2", 1, v2(1)),
        ("MLDv2", 8, v2(8)),
        ("MLDv2", 64, v2(64)),
    ]
    .into_iter()
    .map(|(name, records, bytes)| {
        let mut total = [Duration::ZERO; 2];
        let mut runs = 0;
        while runs < RUNS / records {
            let repeat = EVENTS / records;
            // Alternate between the usual program and the traced one.
            for (kernel, total) in both.iter_mut().zip(&mut total) {
                kernel.snoop(&bytes);
                kernel.events();
                *total += kernel.snoop_repeatedly(&bytes, repeat);
            }
            runs += repeat;
        }
        let [ns_per_report, traced_ns_per_report] =
            total.map(|total| (total.as_nanos() / u128::from(runs)) as u64);
        ReportCost {
            name,
            records,
            frame_bytes: bytes.len(),
            ns_per_report,
            traced_ns_per_report,
        }
    })
    .collect()
}

/// Writes Reports to a TAP as fast as one thread can. Returns Reports per second.
fn tap() -> u64 {
    let mut tap = open_tap("snoop0");
    ip(&["link", "set", "snoop0", "up"]);
    let ifindex = match nix::net::if_::if_nametoindex("snoop0") {
        Ok(ifindex) => ifindex,
        Err(error) => panic!("No TAP: {error}"),
    };
    let mut kernel = Kernel::load().unwrap_or_else(|| panic!("Needs root"));
    kernel.limit_port(ifindex, 100_000, 100_000, u32::MAX);
    kernel.attach_snoop("snoop0");
    let report = Frame::report(&[record(4, "ff1e::1", &[])]).bytes();
    let start = Instant::now();
    while start.elapsed() < Duration::from_secs(TAP_SECONDS) {
        for _ in 0..256 {
            tap.write_all(&report).unwrap();
        }
    }
    let seconds = start.elapsed().as_secs_f64();
    (kernel.usage_of(ifindex).reports as f64 / seconds) as u64
}

fn host() -> HostCost {
    let mut kernel = Kernel::load().unwrap_or_else(|| panic!("Needs root"));
    let empty = kernel.memory("LISTENERS");
    for port in 0..PORTS {
        for address in 0..ADDRESSES {
            let mut multicast_address = frame::address("ff1e::");
            multicast_address[12..].copy_from_slice(&address.to_be_bytes());
            let key = ListenerKey {
                ifindex: 100 + port,
                vlan: 0,
                bridge: BridgeNumber::FIRST,
                multicast_address,
            };
            let value = Listener {
                first_report_ns: 1,
                last_report_ns: 1,
                last_answer_ns: 1,
                generation: 1,
                source_count: 0,
                filter_mode: FilterMode::Exclude as u8,
                mld_version: 2,
                guest_mac: frame::MAC,
            };
            kernel.insert_listener(key, value);
        }
    }
    let start = Instant::now();
    let listeners = kernel.listeners().len();
    let read_ms = start.elapsed().as_secs_f64() * 1000.0;
    assert_eq!(listeners as u32, PORTS * ADDRESSES);
    let full = kernel.memory("LISTENERS");
    HostCost {
        ports: PORTS,
        addresses_per_port: ADDRESSES,
        memory_bytes: full.max(empty),
        read_ms,
        command_ms: command(),
    }
}

/// Lets an agent learn all listeners through as many TAPs, and times the command that lists them.
fn command() -> f64 {
    let lab = LabConfig::new("benchsnoop");
    let mut testbed = Testbed::up(lab, 128, Some(AgentOptions::DEFAULT)).unwrap();
    let vms = testbed.lab().vms1().clone();
    let mut taps: Vec<File> = vms
        .within(|| {
            let open = |port| {
                let name = format!("vnet{port}");
                let tap = open_tap(&name);
                ip(&["link", "set", &name, "master", "br0", "up"]);
                tap
            };
            (0..PORTS).map(open).collect()
        })
        .unwrap();
    let reports: Vec<Vec<u8>> = (0..ADDRESSES)
        .step_by(RECORDS as usize)
        .map(|first| {
            let records: Vec<_> = (first..first + RECORDS)
                .map(|number| record(4, &format!("ff1e::1:{number:x}"), &[]))
                .collect();
            Frame::report(&records).bytes()
        })
        .collect();
    let agents = testbed.agents().unwrap();
    let listed = || {
        let mut list = agents.command(&vms, &["listeners", "--json"]);
        let start = Instant::now();
        let text = vms.output(&mut list).unwrap();
        let ms = start.elapsed().as_secs_f64() * 1000.0;
        let rows: Vec<serde_json::Value> = serde_json::from_str(&text).unwrap();
        (rows.len() as u32, ms)
    };
    wait::until("the agent to know all listeners", TAKEN_IN, || {
        for tap in &mut taps {
            for report in &reports {
                tap.write_all(report).unwrap();
            }
        }
        (listed().0 == PORTS * ADDRESSES).then_some(())
    })
    .unwrap();
    let times: Vec<f64> = (0..COMMANDS).map(|_| listed().1).collect();
    lab::bench::median(&times)
}

fn open_tap(name: &str) -> File {
    let tap = OpenOptions::new()
        .read(true)
        .write(true)
        .open("/dev/net/tun")
        .unwrap();
    // SAFETY: an all-zero `ifreq` is valid.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the request lives through the call.
    let result = unsafe { libc::ioctl(tap.as_raw_fd(), libc::TUNSETIFF as _, &raw mut request) };
    assert_eq!(
        result,
        0,
        "Cannot make a TAP: {}",
        std::io::Error::last_os_error()
    );
    tap
}

fn ip(arguments: &[&str]) {
    let status = Command::new("ip").args(arguments).status().unwrap();
    assert!(status.success(), "ip {arguments:?} failed");
}
