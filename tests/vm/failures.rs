//! Failures during a migration. Whichever process dies, the guest keeps running and receiving, on
//! exactly one host.
//!
//! Each test moves one guest back and forth in one lab, with one accident per migration. The guest
//! is not restarted in between, so leftovers of an accident would harm the later migrations.
#![allow(
    clippy::expect_used,
    clippy::panic,
    clippy::unwrap_used,
    reason = "a test that cannot go on panics"
)]

use std::net::Ipv6Addr;
use std::time::Duration;

use lab::node::Process;
use lab::scenario::agents::AgentOptions;
use lab::scenario::stream::{self, RECEIVER, Stream, StreamConfig, StreamKind};
use lab::scenario::{STREAM_ADDRESS, Testbed, state};
use lab::vms::Vms;
use lab::{LabConfig, Site, machine, requirements, wait};
use serde_json::Value;

/// Slow enough to hit every phase: both the tree and the copy take a while.
const TREE_MS: u64 = 1500;
const BANDWIDTH_MIB: u64 = 24;
/// The same for a lab in which an operator's command takes seconds.
const BANDWIDTH_INSIDE_MIB: u64 = 4;
const STREAM: StreamConfig = StreamConfig {
    rate_mbps: 2.0,
    flows: 1,
    kind: StreamKind::Probe,
};
const SETTLED: Duration = Duration::from_secs(90);
/// Packets that the guest must still receive after an accident; half a second of the stream.
const PACKETS: usize = 86;

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Accident {
    SourceAgentDies,
    DestinationAgentDies,
    SourceLibvirtdDies,
    DestinationLibvirtdDies,
    OperatorAborts,
}

const DEATHS: [Accident; 4] = [
    Accident::SourceAgentDies,
    Accident::DestinationAgentDies,
    Accident::SourceLibvirtdDies,
    Accident::DestinationLibvirtdDies,
];

/// Phases of the source agent in which accidents happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Preparing,
    Copying,
    Switching,
}

impl Phase {
    fn name(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Copying => "copying",
            Self::Switching => "switching",
        }
    }
}

/// A receiving guest and its location.
struct Moves {
    testbed: Testbed,
    stream: Stream,
    /// Index of the VM host on which the guest runs.
    at: usize,
    count: usize,
}

impl Moves {
    fn up(name: &str) -> Option<Self> {
        if !requirements::met() {
            return None;
        }
        let mut config = LabConfig::new(name);
        config.sites = [Site::Late(TREE_MS); 2];
        let options = AgentOptions {
            bandwidth_mib: if machine::inside() {
                BANDWIDTH_INSIDE_MIB
            } else {
                BANDWIDTH_MIB
            },
            tree_budget_ms: Some(4000),
            ..AgentOptions::DEFAULT
        };
        let mut testbed = Testbed::up(config, 128, Some(options)).unwrap();
        testbed.boot().unwrap();
        let stream = Stream::start(testbed.lab(), &STREAM).unwrap();
        let guest = testbed.guest().unwrap();
        guest
            .start_receiver(RECEIVER, stream::receiver(&STREAM))
            .unwrap();
        guest
            .wait_arrivals(RECEIVER, 1, Duration::from_secs(20))
            .unwrap();
        Some(Self {
            testbed,
            stream,
            at: 0,
            count: 0,
        })
    }

    /// Starts a migration, causes the accident in the given phase, and checks the result.
    fn one(&mut self, accident: Accident, phase: Phase) {
        let case = format!("{accident:?} while {}", phase.name());
        eprintln!("{case}, guest on vms{}", self.at + 1);
        let (source, destination) = (self.at, 1 - self.at);
        self.wait_listens(source);
        if phase == Phase::Preparing {
            // Without the tree, the destination has to wait for it.
            self.wait_pruned(destination);
        }
        let hosts = self.testbed.lab().vms().clone();
        let before = [0, 1].map(|host| {
            let last = self.last_record(&hosts[host], direction(host, source));
            last.map(|row| number(&row)).unwrap_or_default()
        });
        let begun = self.testbed.guest().unwrap().arrivals(RECEIVER).len();
        let mut operator = self.migrate(source, destination);
        self.wait_phase(&operator, source, phase);
        self.happen(accident, phase, source);
        operator.wait(SETTLED).unwrap();
        eprintln!(
            "    operator: {}",
            operator.printed().trim().replace('\n', "; ")
        );
        let restarted = match accident {
            Accident::SourceAgentDies => Some(source),
            Accident::DestinationAgentDies => Some(destination),
            _ => None,
        };
        if let Some(index) = restarted {
            self.testbed.restart_agent(index).unwrap();
        }
        self.check(&case, source, before, restarted);
        self.check_packets(&case, source, begun);
    }

    /// Checks that the guest received every packet once and in order. The check is skipped if the
    /// guest moved and a dead agent could not hand it over.
    fn check_packets(&self, case: &str, source: usize, begun: usize) {
        let arrivals = self.testbed.guest().unwrap().arrivals(RECEIVER);
        let numbers: Vec<u32> = arrivals[begun..].iter().map(|it| it.sequence).collect();
        let (mut missing, mut again) = (0, 0);
        for pair in numbers.windows(2) {
            match i64::from(pair[1]) - i64::from(pair[0]) {
                1 => {}
                step if step > 1 => missing += step - 1,
                _ => again += 1,
            }
        }
        let stayed = self.at == source;
        eprintln!("    packets: {missing} missing, {again} again or out of order");
        if stayed {
            assert_eq!((missing, again), (0, 0), "{case}");
        }
    }

    /// Returns an agent's last record of a direction. A later record of the other direction may
    /// exist, because a restarted agent learns of the previous migration once its peer reconnects.
    fn last_record(&mut self, vms: &Vms, direction: &str) -> Option<Value> {
        let migrations = self.query(vms, "migrations");
        let mut rows = migrations.as_array()?.iter().rev();
        rows.find(|row| row["direction"] == direction).cloned()
    }

    fn migrate(&mut self, source: usize, destination: usize) -> Process {
        self.count += 1;
        let hosts = self.testbed.lab().vms().clone();
        let name = self.testbed.domain_name().to_owned();
        let arguments = ["migrate", &name, hosts[destination].name()];
        let command = self
            .testbed
            .agents()
            .unwrap()
            .command(&hosts[source], &arguments);
        hosts[source]
            .spawn(&format!("migrate{}", self.count), command)
            .unwrap()
    }

    fn wait_phase(&mut self, operator: &Process, source: usize, phase: Phase) {
        let hosts = self.testbed.lab().vms().clone();
        wait::until(&format!("the phase {}", phase.name()), SETTLED, || {
            if !operator.printed().lines().any(|line| line == phase.name()) {
                return None;
            }
            let agents = self.testbed.agents().ok()?;
            let begun = match phase {
                // The source starts by itself; the destination has something to undo once it has
                // joined.
                Phase::Preparing => {
                    let status = agents.query(&hosts[1 - source], "status").ok()?;
                    !status["receptions"].as_array()?.is_empty()
                }
                // The phase starts with the call of libvirt; the job starts later.
                Phase::Copying => {
                    let migrations = agents.query(&hosts[source], "migrations").ok()?;
                    migrations.as_array()?.last()?["processed_bytes"].as_u64()? > 0
                }
                Phase::Switching => true,
            };
            begun.then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}: {}", operator.printed()));
    }

    fn happen(&mut self, accident: Accident, phase: Phase, source: usize) {
        let destination = 1 - source;
        let hosts = self.testbed.lab().vms().clone();
        match accident {
            Accident::SourceAgentDies => self.testbed.agents().unwrap().kill(source),
            Accident::DestinationAgentDies => self.testbed.agents().unwrap().kill(destination),
            // A supervisor restarts it within a second, as systemd does.
            Accident::SourceLibvirtdDies => hosts[source].kill_libvirtd().unwrap(),
            Accident::DestinationLibvirtdDies => hosts[destination].kill_libvirtd().unwrap(),
            Accident::OperatorAborts => {
                let name = self.testbed.domain_name().to_owned();
                let agents = self.testbed.agents().unwrap();
                let mut abort = agents.command(&hosts[source], &["abort", &name]);
                if let Err(error) = hosts[source].output(&mut abort) {
                    // The switch may complete before the operator's command takes effect.
                    let error = format!("{error:#}");
                    let is_late = phase == Phase::Switching && error.contains("is not being moved");
                    assert!(is_late, "{error}");
                }
            }
        }
    }

    /// Checks that the guest runs and receives on exactly one host, that both agents ended the
    /// migration and recorded the outcome, and that nothing is left over.
    fn check(&mut self, case: &str, source: usize, before: [u64; 2], restarted: Option<usize>) {
        let hosts = self.testbed.lab().vms().clone();
        wait::until("both agents to have ended the migration", SETTLED, || {
            hosts.iter().all(|vms| self.is_settled(vms)).then_some(())
        })
        .unwrap_or_else(|error| panic!("{case}: {error:#}\n{}", self.logs()));
        let at = wait::until("the guest to run on exactly one host", SETTLED, || {
            let name = self.testbed.domain_name();
            let states = hosts.each_ref().map(|vms| state(vms, name));
            let runs = states
                .each_ref()
                .map(|state| state.as_deref() == Some("running"));
            let is_off =
                |state: &Option<String>| state.as_deref().is_none_or(|it| it == "shut off");
            match runs {
                [true, false] if is_off(&states[1]) => Some(0),
                [false, true] if is_off(&states[0]) => Some(1),
                _ => None,
            }
        })
        .unwrap_or_else(|error| panic!("{case}: {error:#}\n{}", self.logs()));
        let guest = self.testbed.guest().unwrap();
        guest.wait_host(hosts[at].name(), SETTLED).unwrap();
        let seen = guest.arrivals(RECEIVER).len();
        guest
            .wait_arrivals(RECEIVER, seen + PACKETS, SETTLED)
            .unwrap_or_else(|error| {
                panic!("{case}: guest on vms{}: {error:#}\n{}", at + 1, self.logs())
            });
        self.at = at;
        for (index, vms) in hosts.iter().enumerate() {
            if restarted == Some(index) {
                self.check_restarted(case, vms);
                continue;
            }
            let last = self
                .last_record(vms, direction(index, source))
                .filter(|row| number(row) > before[index])
                .unwrap_or_else(|| panic!("{case}: {} has no record\n{}", vms.name(), self.logs()));
            eprintln!("    {}: {}", vms.name(), last["outcome"]);
            let outcome = &last["outcome"];
            let completed = outcome["state"] == "completed";
            assert_eq!(
                completed,
                at != source,
                "{case}: {} says {outcome}\n{}",
                vms.name(),
                self.logs()
            );
            assert!(
                completed
                    || outcome["reason"]
                        .as_str()
                        .is_some_and(|reason| !reason.is_empty()),
                "{case}: {} says {outcome}",
                vms.name()
            );
        }
        if at == source {
            let destination = &hosts[1 - source];
            wait::until("the destination to undo its joins", SETTLED, || {
                let status = self
                    .testbed
                    .agents()
                    .ok()?
                    .query(destination, "status")
                    .ok()?;
                status["receptions"]
                    .as_array()
                    .is_some_and(Vec::is_empty)
                    .then_some(())
            })
            .unwrap_or_else(|error| panic!("{case}: {error:#}\n{}", self.logs()));
        }
    }

    /// Checks that a restarted agent logs its adopted state, if there is any.
    fn check_restarted(&mut self, case: &str, vms: &Vms) {
        let migrations = self.query(vms, "migrations");
        for row in migrations.as_array().unwrap() {
            eprintln!("    {} (restarted): {}", vms.name(), row["outcome"]);
            let outcome = &row["outcome"];
            assert!(
                outcome["state"] == "completed" || outcome["reason"].is_string(),
                "{case}: {} says {outcome}",
                vms.name()
            );
        }
    }

    fn is_settled(&mut self, vms: &Vms) -> bool {
        let Ok(agents) = self.testbed.agents() else {
            return false;
        };
        agents.query(vms, "status").is_ok_and(|status| {
            status["hypervisor"]["state"] == "up"
                && status["migrations"].as_array().is_some_and(Vec::is_empty)
        })
    }

    fn query(&mut self, vms: &Vms, table: &str) -> Value {
        self.testbed.agents().unwrap().query(vms, table).unwrap()
    }

    /// Waits until the agent of a VM host knows the guest's listeners.
    fn wait_listens(&mut self, host: usize) {
        let vms = self.testbed.lab().vms()[host].clone();
        wait::until("the agent to know the guest", SETTLED, || {
            let listeners = self.testbed.agents().ok()?.query(&vms, "listeners").ok()?;
            let is_stream = |row: &Value| {
                let address = row["multicast_address"]
                    .as_str()
                    .and_then(|it| it.parse().ok());
                address == Some(STREAM_ADDRESS) && !row["domain"].is_null()
            };
            listeners.as_array()?.iter().any(is_stream).then_some(())
        })
        .unwrap_or_else(|error| panic!("{error:#}\n{}", self.logs()));
    }

    /// Waits until the switch of a site has no listener for the stream.
    fn wait_pruned(&self, site: usize) {
        let switch = self.testbed.lab().switch(site + 1);
        wait::until("the tree to be pruned", SETTLED, || {
            let mdb = switch
                .output(switch.command("bridge").args(["mdb", "show"]))
                .ok()?;
            let is_stream = |word: &str| word.parse::<Ipv6Addr>() == Ok(STREAM_ADDRESS);
            (!mdb.split_whitespace().any(is_stream)).then_some(())
        })
        .unwrap();
    }

    /// Returns the last log lines of both agents, for the failure message.
    fn logs(&mut self) -> String {
        let hosts = self.testbed.lab().vms().clone();
        let agents = self.testbed.agents().unwrap();
        let mut text = String::new();
        for vms in &hosts {
            let log = agents.log(vms);
            let lines: Vec<&str> = log.lines().collect();
            let last = lines.len().saturating_sub(60);
            text += &format!("--- {}\n{}\n", vms.name(), lines[last..].join("\n"));
        }
        text
    }

    fn end(self) {
        self.stream.stop().unwrap();
    }
}

/// Returns the direction of the migration from a host's point of view, when the domain leaves
/// `source`.
fn direction(host: usize, source: usize) -> &'static str {
    if host == source {
        "outgoing"
    } else {
        "incoming"
    }
}

fn number(record: &Value) -> u64 {
    record["migration"].as_u64().unwrap()
}

#[test]
fn whatever_dies_in_whatever_phase_the_guest_receives_on_exactly_one_host() {
    let Some(mut moves) = Moves::up("faildeath") else {
        return;
    };
    for phase in [Phase::Preparing, Phase::Copying, Phase::Switching] {
        for accident in DEATHS {
            moves.one(accident, phase);
        }
    }
    moves.end();
}

#[test]
fn operator_can_abort_in_every_phase() {
    let Some(mut moves) = Moves::up("failabort") else {
        return;
    };
    // The switch may complete before the cancellation; both outcomes are correct.
    for phase in [Phase::Preparing, Phase::Copying, Phase::Switching] {
        moves.one(Accident::OperatorAborts, phase);
    }
    moves.end();
}
