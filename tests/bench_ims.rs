//! Capacity of the mapping server: lookups and updates per second and their latency with 1, 1,000
//! and 100,000 mappings, and the rate at which it refuses forged datagrams. The real program runs
//! on one CPU; a client on another CPU asks it over loopback.
//!
//! `--report FILE` also writes the numbers as JSON. CPU times cover only the server, so they are
//! meaningful on a busy machine.

#![allow(
    clippy::panic,
    clippy::unwrap_used,
    reason = "a bench that can't run has to stop"
)]

use std::fs::File;
use std::io::{IoSlice, IoSliceMut, Write as _};
use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::os::fd::AsRawFd as _;
use std::process::Command;
use std::time::{Duration, Instant};

use common::mat::key::{Key, Secret};
use common::mat::message::{LookupRequest, MatMessage};
use nix::sched::{CloneFlags, CpuSet, sched_setaffinity, unshare};
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn6, recvmmsg, sendmmsg};
use nix::unistd::Pid;
use roamcast::proto::ims::{MappingStore as _, Record, Write};
use roamcast::runtime::ims::store::Store;
use serde::Serialize;
use support::ims::{Files, SECRET, Server, hoa, moa, opened, sealed, update_request, wall_ms};

const PORT: u16 = 47413;
/// Number of the node that looks up.
const READER: u32 = 900_000;
const LOOKUPS: u64 = 200_000;
const FORGED: u64 = 200_000;
/// Time for which updates are sent.
const UPDATES: Duration = Duration::from_secs(5);
/// Limit of outstanding requests.
const WINDOW: usize = 128;
/// Lookup rate per second at which the latency is measured.
const PACE: u64 = 10_000;
const PACED_LOOKUPS: u64 = 30_000;
/// Datagrams per system call.
const BATCH: usize = 32;
/// Time after which a request without an answer counts as lost.
const LOST: Duration = Duration::from_secs(5);

#[derive(Serialize)]
struct Results {
    kernel: String,
    server_cpus: usize,
    mappings: Vec<Setting>,
}

/// Results for one count of mappings.
#[derive(Serialize)]
struct Setting {
    mappings: u32,
    /// Time from the start of the process to its first answer, milliseconds.
    start_ms: f64,
    resident_kib: u64,
    lookups: Load,
    /// Load at a fixed rate far below the server's limit.
    paced_lookups: Load,
    updates: Load,
    /// Store transactions for these updates.
    commits: u64,
    forged: Load,
}

/// Results for one kind of request.
#[derive(Default, Serialize)]
struct Load {
    per_second: f64,
    /// CPU time of the server per request, microseconds.
    cpu_us: f64,
    p50_us: f64,
    p99_us: f64,
    requests: u64,
    lost: u64,
}

fn main() {
    unshare(CloneFlags::CLONE_NEWNET).unwrap_or_else(|error| panic!("Needs root: {error}"));
    let up = Command::new("ip")
        .args(["link", "set", "lo", "up"])
        .status();
    assert!(up.unwrap().success());
    let mut results = Results {
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")
            .unwrap()
            .trim()
            .to_owned(),
        server_cpus: 1,
        mappings: Vec::new(),
    };
    println!(
        "{:>8} {:<14} {:>10} {:>8} {:>9} {:>9} {:>6}",
        "mappings", "requests", "per second", "CPU us", "p50 us", "p99 us", "lost"
    );
    for mappings in [1, 1000, 100_000] {
        let setting = measure(mappings);
        for (name, load) in [
            ("lookups", &setting.lookups),
            ("lookups, paced", &setting.paced_lookups),
            ("updates", &setting.updates),
            ("forged", &setting.forged),
        ] {
            println!(
                "{mappings:>8} {name:<14} {:>10.0} {:>8.2} {:>9.0} {:>9.0} {:>6}",
                load.per_second, load.cpu_us, load.p50_us, load.p99_us, load.lost
            );
        }
        println!(
            "{mappings:>8} started in {:.0} ms, {} KiB, {} transactions for the updates",
            setting.start_ms, setting.resident_kib, setting.commits
        );
        results.mappings.push(setting);
    }
    let mut arguments = std::env::args().skip_while(|argument| argument != "--report");
    if let Some(file) = arguments.nth(1) {
        let json = serde_json::to_string_pretty(&results).unwrap();
        File::create(file)
            .unwrap()
            .write_all(json.as_bytes())
            .unwrap();
    }
}

fn measure(mappings: u32) -> Setting {
    let directory = tempfile::tempdir().unwrap();
    let limits = "[limits]\nrequests_per_second = 10000000\nburst = 10000000\n\
                  [log]\nlevel = \"warn\"\n";
    let files = Files::new(directory.path(), PORT, limits);
    fill(&files, mappings);
    let cpus = cpus();
    pin(&cpus[..1]);
    let start = Instant::now();
    let server = Server::spawn(&files);
    if let Some(others) = cpus.get(1..).filter(|it| !it.is_empty()) {
        pin(others);
    }
    let mut client = Client::new();
    client.wait_for_server(start);
    let start_ms = start.elapsed().as_secs_f64() * 1000.0;
    let resident_kib = resident(&server);

    let mut next = 0;
    let mut lookups = |client: &mut Client, count: u64| -> Vec<Vec<u8>> {
        (0..count)
            .map(|_| {
                next += 1;
                client.lookup((next % u64::from(mappings)) as u32)
            })
            .collect()
    };
    let asked = lookups(&mut client, LOOKUPS);
    let lookups_load = client.load(&server, asked, None);
    let asked = lookups(&mut client, PACED_LOOKUPS);
    let paced_lookups = client.load(&server, asked, Some(PACE));
    let before = commits(&files);
    let updates = client.updates(&server, mappings);
    let commits = commits(&files) - before;
    let forged = client.forged(&server, &files);
    pin(&cpus);
    Setting {
        mappings,
        start_ms,
        resident_kib,
        lookups: lookups_load,
        paced_lookups,
        updates,
        commits,
        forged,
    }
}

/// Writes mappings into the store of a stopped server.
fn fill(files: &Files, mappings: u32) {
    let store = Store::open(&files.path("store/ims.redb")).unwrap();
    let writes: Vec<Write> = (0..mappings)
        .map(|number| Write {
            hoa: hoa(number).octets(),
            expected: None,
            record: Record {
                generation: 1,
                sequence: 1,
                lifetime_s: 3600,
                until_ms: wall_ms() + 3_600_000,
                moas: update_request(number, 1, 3600).moas,
                freed: Vec::new(),
            },
        })
        .collect();
    store.swap(&writes).unwrap();
}

/// Returns the CPUs that this process may use.
fn cpus() -> Vec<usize> {
    let all = nix::sched::sched_getaffinity(Pid::from_raw(0)).unwrap();
    (0..CpuSet::count())
        .filter(|&cpu| all.is_set(cpu).unwrap())
        .collect()
}

fn pin(cpus: &[usize]) {
    let mut set = CpuSet::new();
    for &cpu in cpus {
        set.set(cpu).unwrap();
    }
    sched_setaffinity(Pid::from_raw(0), &set).unwrap();
}

fn resident(server: &Server) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{}/status", server.0.id())).unwrap();
    let line = status.lines().find_map(|it| it.strip_prefix("VmRSS:"));
    line.unwrap()
        .trim()
        .trim_end_matches(" kB")
        .parse()
        .unwrap()
}

/// Returns the CPU time of all threads of the server.
fn cpu_time(server: &Server) -> Duration {
    let tasks = std::fs::read_dir(format!("/proc/{}/task", server.0.id())).unwrap();
    let nanoseconds = tasks.map(|task| {
        let text = std::fs::read_to_string(task.unwrap().path().join("schedstat")).unwrap();
        text.split(' ').next().unwrap().parse::<u64>().unwrap()
    });
    Duration::from_nanos(nanoseconds.sum())
}

fn commits(files: &Files) -> u64 {
    let status = files.status().unwrap();
    status["counters"]["commits"].as_u64().unwrap_or_default()
}

/// Client that sends requests and counts answers.
struct Client {
    socket: UdpSocket,
    reader: Key,
    transaction: u64,
}

impl Client {
    fn new() -> Self {
        let socket = UdpSocket::bind("[::1]:0").unwrap();
        socket
            .connect(SocketAddrV6::new(Ipv6Addr::LOCALHOST, PORT, 0, 0))
            .unwrap();
        socket
            .set_read_timeout(Some(Duration::from_millis(20)))
            .unwrap();
        Self {
            socket,
            reader: key(READER),
            transaction: 0,
        }
    }

    fn lookup(&mut self, wanted: u32) -> Vec<u8> {
        self.transaction += 1;
        let wanted = hoa(wanted).octets().into();
        let message = LookupRequest { hoa: wanted };
        sealed(READER, &self.reader, self.transaction, &message.into())
    }

    fn wait_for_server(&mut self, start: Instant) {
        let mut buffer = [0; 2048];
        loop {
            let request = self.lookup(0);
            // The send fails while nobody listens.
            let _ = self.socket.send(&request);
            if self.socket.recv(&mut buffer).is_ok() {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "no server");
        }
    }

    /// Sends lookups, as many as the window allows or at a fixed rate. The client decrypts the
    /// answers afterwards, because only the server is measured.
    fn load(&mut self, server: &Server, requests: Vec<Vec<u8>>, pace: Option<u64>) -> Load {
        let count = requests.len();
        let first = self.transaction + 1 - count as u64;
        let mut sent_at = Vec::with_capacity(count);
        let mut answers = Vec::with_capacity(count);
        let mut receiver = Receiver::new();
        let (cpu, start) = (cpu_time(server), Instant::now());
        let mut last = start;
        while answers.len() < count && last.elapsed() < LOST {
            let room = match pace {
                None => WINDOW - sent_at.len().saturating_sub(answers.len()).min(WINDOW),
                Some(pace) => {
                    let due = start.elapsed().as_nanos() * u128::from(pace) / 1_000_000_000;
                    (due as usize).saturating_sub(sent_at.len()).min(BATCH)
                }
            };
            let waiting = &requests[sent_at.len()..];
            let now = Instant::now();
            let sent = send(&self.socket, &waiting[..room.min(BATCH).min(waiting.len())]);
            sent_at.extend(std::iter::repeat_n(now, sent));
            receiver.receive(&self.socket, |datagram| {
                last = Instant::now();
                answers.push((last, datagram.to_vec()));
            });
        }
        let used = cpu_time(server) - cpu;
        let times = answers
            .iter()
            .filter_map(|(at, datagram)| {
                let (transaction, reply) = opened(&self.reader, datagram);
                // Late answers to earlier requests are ignored.
                let index = transaction.checked_sub(first)?;
                let MatMessage::LookupReply(reply) = reply else {
                    panic!("{reply:?}");
                };
                assert!(reply.mapping.is_some(), "{reply:?}");
                Some(*at - sent_at[index as usize])
            })
            .collect();
        summary(used, last - start, times, count as u64)
    }

    /// Sends updates of all nodes, as many at once as the window allows.
    fn updates(&mut self, server: &Server, mappings: u32) -> Load {
        let nodes = mappings.min(WINDOW as u32);
        let keys: Vec<Key> = (0..nodes).map(key).collect();
        let base = self.transaction + 1;
        let mut sequences = vec![1; nodes as usize];
        let mut sent_at = Vec::new();
        let mut owners: Vec<u32> = Vec::new();
        let mut times = Vec::new();
        let mut receiver = Receiver::new();
        let (cpu, start) = (cpu_time(server), Instant::now());
        let mut last = start;
        let mut ready: Vec<u32> = (0..nodes).collect();
        while start.elapsed() < UPDATES || times.len() < sent_at.len() && last.elapsed() < LOST {
            if start.elapsed() < UPDATES {
                let now = Instant::now();
                let datagrams: Vec<Vec<u8>> = ready
                    .drain(..)
                    .map(|number| {
                        let sequence = &mut sequences[number as usize];
                        *sequence += 1;
                        self.transaction += 1;
                        owners.push(number);
                        let request = update_request(number, *sequence, 3600).into();
                        sealed(number, &keys[number as usize], self.transaction, &request)
                    })
                    .collect();
                for batch in datagrams.chunks(BATCH) {
                    assert_eq!(send(&self.socket, batch), batch.len());
                }
                sent_at.resize(owners.len(), now);
            }
            receiver.receive(&self.socket, |datagram| {
                last = Instant::now();
                let hoa: [u8; 16] = datagram[4..20].try_into().unwrap();
                let number = u32::from_be_bytes(hoa[12..].try_into().unwrap());
                let (transaction, reply) = opened(&keys[number as usize], datagram);
                let MatMessage::UpdateReply(reply) = reply else {
                    panic!("{reply:?}");
                };
                assert_eq!(reply.outcome, 0, "{reply:?}");
                let index = (transaction - base) as usize;
                assert_eq!(owners[index], number);
                times.push(last - sent_at[index]);
                ready.push(number);
            });
        }
        // The stored mapping is readable.
        let (number, sequence) = (0, sequences[0]);
        let request = self.lookup(number);
        self.socket.send(&request).unwrap();
        receiver.wait(&self.socket, |datagram| {
            let (_, reply) = opened(&self.reader, datagram);
            let MatMessage::LookupReply(reply) = reply else {
                panic!("{reply:?}");
            };
            let found = reply.mapping.unwrap();
            assert_eq!(found.sequence, sequence);
            assert_eq!(*found.moas[0].address, moa(number, sequence).octets());
        });
        let used = cpu_time(server) - cpu;
        summary(used, last - start, times, owners.len() as u64)
    }

    /// Sends datagrams in a node's name without its key until the server has refused all of them.
    fn forged(&mut self, server: &Server, files: &Files) -> Load {
        let wrong = Key([9; 32]);
        let request = LookupRequest {
            hoa: hoa(0).octets().into(),
        };
        let request = MatMessage::from(request);
        let datagrams: Vec<Vec<u8>> = (0..FORGED)
            .map(|number| sealed(0, &wrong, number, &request))
            .collect();
        let count = || {
            let status = files.status().unwrap();
            status["counters"]["forged"].as_u64().unwrap_or_default()
        };
        let before = count();
        let (cpu, start) = (cpu_time(server), Instant::now());
        let mut rest = datagrams.as_slice();
        while !rest.is_empty() {
            let sent = send(&self.socket, &rest[..BATCH.min(rest.len())]);
            rest = &rest[sent..];
        }
        let elapsed = start.elapsed();
        let used = cpu_time(server) - cpu;
        let refused = count() - before;
        Load {
            per_second: refused as f64 / elapsed.as_secs_f64(),
            cpu_us: used.as_secs_f64() * 1e6 / refused.max(1) as f64,
            requests: FORGED,
            // The socket buffer overflowed.
            lost: FORGED - refused,
            ..Load::default()
        }
    }
}

fn summary(used: Duration, elapsed: Duration, mut times: Vec<Duration>, requests: u64) -> Load {
    times.sort_unstable();
    let at = |share: f64| {
        let index = (times.len() as f64 * share) as usize;
        times[index.min(times.len() - 1)].as_secs_f64() * 1e6
    };
    Load {
        per_second: times.len() as f64 / elapsed.as_secs_f64(),
        cpu_us: used.as_secs_f64() * 1e6 / times.len() as f64,
        p50_us: at(0.5),
        p99_us: at(0.99),
        requests,
        lost: requests - times.len() as u64,
    }
}

fn key(number: u32) -> Key {
    Secret::new(&SECRET).node(hoa(number).octets(), 1)
}

/// Sends datagrams with one system call. Returns the number sent.
fn send(socket: &UdpSocket, datagrams: &[Vec<u8>]) -> usize {
    if datagrams.is_empty() {
        return 0;
    }
    let slices: Vec<[IoSlice<'_>; 1]> = datagrams.iter().map(|it| [IoSlice::new(it)]).collect();
    let mut headers = MultiHeaders::<SockaddrIn6>::preallocate(slices.len(), None);
    let addresses = vec![None; slices.len()];
    let flags = MsgFlags::empty();
    let sent = sendmmsg(
        socket.as_raw_fd(),
        &mut headers,
        &slices,
        &addresses,
        [],
        flags,
    );
    sent.map_or(0, Iterator::count)
}

/// Buffers for one batch of received datagrams.
struct Receiver {
    headers: MultiHeaders<SockaddrIn6>,
    buffers: Vec<[u8; 1500]>,
}

impl Receiver {
    fn new() -> Self {
        Self {
            headers: MultiHeaders::preallocate(BATCH, None),
            buffers: vec![[0; 1500]; BATCH],
        }
    }

    /// Receives the waiting datagrams without blocking.
    fn receive(&mut self, socket: &UdpSocket, mut each: impl FnMut(&[u8])) {
        let mut slices: Vec<[IoSliceMut<'_>; 1]> = self
            .buffers
            .iter_mut()
            .map(|it| [IoSliceMut::new(it)])
            .collect();
        let flags = MsgFlags::MSG_DONTWAIT;
        let headers = &mut self.headers;
        let received = recvmmsg(socket.as_raw_fd(), headers, slices.iter_mut(), flags, None);
        let lengths: Vec<usize> = match received {
            Ok(messages) => messages.map(|it| it.bytes).collect(),
            Err(_) => return,
        };
        for (length, buffer) in lengths.into_iter().zip(&self.buffers) {
            each(&buffer[..length]);
        }
    }

    /// Waits for one datagram.
    fn wait(&mut self, socket: &UdpSocket, mut each: impl FnMut(&[u8])) {
        let start = Instant::now();
        let mut done = false;
        while !done {
            assert!(start.elapsed() < LOST, "no answer");
            self.receive(socket, |datagram| {
                each(datagram);
                done = true;
            });
        }
    }
}
