//! One migration of one guest by `migkick`, an operator or virsh, and the durations of its phases.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use serde_json::Value;

use super::agents::AgentOptions;
use super::{Testbed, virsh};
use crate::guest::control::Control;
use crate::probe::metrics::Arrival;
use crate::probe::picture::Phase;
use crate::probe::report::RunRow;
use crate::vms::Vms;
use crate::{machine, wait};

/// Longest wait for a line of `migkick go`, and for its end.
const MOVE: Duration = Duration::from_secs(120);
/// Label of the log of migrations that are cancelled.
const CANCELLED: &str = "cancelled";
/// Time for which the destination's QEMU stands still, and for which it copies, by turns. The agent
/// must hear of the VM's stop in the first one, and libvirt needs longer than the second one to resume
/// the VM.
const FROZEN: Duration = Duration::from_millis(200);
const FROZEN_INSIDE: Duration = Duration::from_secs(2);
const COPYING: Duration = Duration::from_millis(20);

/// Who requests the migration.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mover {
    /// `migkick go` in the guest.
    Migkick,
    /// `roamcast migrate` by an operator.
    Operator,
    /// `virsh migrate --p2p`: the baseline if there are no agents, otherwise a migration that
    /// Roamcast does not start itself.
    Virsh,
    /// `virsh migrate` without `--p2p`: virsh connects to both libvirtds, and the libvirtds do not
    /// connect to each other. libvirt has no job until the destination is prepared.
    VirshDirect,
    /// `roamcast migrate` by an operator. QEMU at the destination dies after the VM has stopped, and
    /// the VM resumes at its source host.
    Cancelled,
}

impl Mover {
    /// Returns true if the VM runs at the destination host in the end.
    pub(super) fn arrives(self) -> bool {
        self != Self::Cancelled
    }
}

/// A guest, and the source and the destination of its migration.
pub(super) struct Journey<'a> {
    pub(super) testbed: &'a Testbed,
    /// Name of the guest's libvirt domain.
    pub(super) domain: &'a str,
    pub(super) control: &'a Control,
    /// Index of the source VM host.
    pub(super) from: usize,
    /// Index of the destination VM host.
    pub(super) to: usize,
}

impl Journey<'_> {
    /// Migrates the guest. Calls `tell` at each step.
    pub(super) fn go(&self, mover: Mover, tell: &mut dyn FnMut(&str)) -> Result<Times> {
        match mover {
            Mover::Migkick => self.by_migkick(tell),
            Mover::Operator => self.by_operator(),
            Mover::Virsh => self.by_virsh(&["--p2p"]),
            Mover::VirshDirect => self.by_virsh(&[]),
            Mover::Cancelled => self.cancelled(),
        }
    }

    fn hosts(&self) -> (&Vms, &Vms) {
        let hosts = self.testbed.lab().vms();
        (&hosts[self.from], &hosts[self.to])
    }

    fn by_migkick(&self, tell: &mut dyn FnMut(&str)) -> Result<Times> {
        let (_, to) = self.hosts();
        let mut running = self.control.spawn("migkick", &["go", to.name()])?;
        while let Some(line) = running.next_line(MOVE)? {
            tell(&format!("migkick: {}", line.text));
        }
        let output = running.wait(MOVE)?;
        ensure!(
            output.code == Some(0),
            "migkick ended with {:?}: {}",
            output.code,
            output.stderr().trim()
        );
        self.recorded()
    }

    fn by_operator(&self) -> Result<Times> {
        let (from, to) = self.hosts();
        let agents = self.testbed.running_agents()?;
        from.output(&mut agents.command(from, &["migrate", self.domain, to.name()]))?;
        self.recorded()
    }

    /// Kills the destination's QEMU after the VM has stopped. Until then the destination's QEMU
    /// stands still most of the time, so the VM cannot resume there.
    fn cancelled(&self) -> Result<Times> {
        let (from, to) = self.hosts();
        let agents = self.testbed.running_agents()?;
        let started = Instant::now();
        let migrate = agents.command(from, &["migrate", self.domain, to.name()]);
        let printed = || fs::read_to_string(from.log_path(CANCELLED)).unwrap_or_default();
        let earlier = printed().len();
        let mut operator = from.spawn(CANCELLED, migrate)?;
        let is_in = |phase: &str| {
            let log = printed();
            let new = log.get(earlier..)?;
            new.lines().any(|line| line == phase).then_some(())
        };
        // The agent is in the phase `copying` before libvirt has started the other QEMU.
        let qemu = wait::until("QEMU at the destination", MOVE, || {
            to.qemu(self.domain).ok()
        })?;
        let frozen = if machine::inside() {
            FROZEN_INSIDE
        } else {
            FROZEN
        };
        while started.elapsed() < MOVE {
            kill(qemu, Signal::SIGSTOP).context("Failed to stop QEMU")?;
            // The agent knows at once that the VM has stopped.
            if wait::until("the VM to stop", frozen, || is_in("switching")).is_ok() {
                kill(qemu, Signal::SIGKILL).context("Failed to kill QEMU")?;
                operator.wait(MOVE)?;
                return Ok(Times {
                    total_ms: started.elapsed().as_secs_f64() * 1e3,
                    ..Times::default()
                });
            }
            kill(qemu, Signal::SIGCONT).context("Failed to continue QEMU")?;
            let ended = wait::until("the migration to end", COPYING, || {
                operator.try_wait().ok().flatten()
            });
            ensure!(ended.is_err(), "The migration ended: {}", printed());
        }
        bail!("The VM did not stop")
    }

    /// Returns the records of both agents about the domain's last migration, the source's first;
    /// null if there is no record.
    pub(super) fn records(&self) -> Result<[Value; 2]> {
        if self.testbed.agents.is_none() {
            return Ok(Default::default());
        }
        let record = |host, direction| -> Result<Value> {
            let is_this =
                |row: &Value| row["direction"] == direction && row["domain"] == self.domain;
            let records = self.testbed.records(host)?;
            Ok(records.into_iter().rev().find(is_this).unwrap_or_default())
        };
        Ok([record(self.from, "outgoing")?, record(self.to, "incoming")?])
    }

    /// Returns the durations in the source's record.
    fn recorded(&self) -> Result<Times> {
        let [record, _] = self.records()?;
        let ms = |key: &str| record[key].as_f64();
        let (Some(signalling_ms), Some(copy_ms), Some(total_ms)) =
            (ms("signalling_ms"), ms("copy_ms"), ms("total_ms"))
        else {
            bail!("The agent's record of the move lacks times: {record}");
        };
        Ok(Times {
            signalling_ms,
            copy_ms,
            total_ms,
            vm_pause_ms: ms("vm_pause_ms").unwrap_or_default(),
        })
    }

    /// Migrates by `virsh migrate` with the flags and limits of an agent with the testbed's
    /// options. `how` holds further arguments.
    fn by_virsh(&self, how: &[&str]) -> Result<Times> {
        let (from, to) = self.hosts();
        let name = self.domain;
        let limits = &self.testbed.limits;
        let downtime = limits.downtime_ms.to_string();
        virsh(from, &["migrate-setmaxdowntime", name, &downtime])?;
        let options = virsh_options(limits);
        let options: Vec<&str> = options.iter().map(String::as_str).collect();
        let uri = to.uri();
        let memory = format!("tcp://[{}]", to.address());
        let arguments = [
            "migrate",
            "--live",
            "--persistent",
            "--undefinesource",
            "--domain",
            name,
            "--desturi",
            &uri,
            "--migrateuri",
            &memory,
        ];
        let started = Instant::now();
        virsh(from, &[&arguments, how, &options[..]].concat())?;
        let total_ms = started.elapsed().as_secs_f64() * 1e3;
        let job = virsh(to, &["domjobinfo", "--completed", "--rawstats", name])
            .or_else(|_| virsh(to, &["domjobinfo", "--completed", name]))?;
        let vm_pause_ms = statistic(&job, "downtime", "Total downtime").unwrap_or_default();
        let elapsed_ms = statistic(&job, "time_elapsed", "Time elapsed").unwrap_or(total_ms);
        Ok(Times {
            copy_ms: (elapsed_ms - vm_pause_ms).max(0.0),
            total_ms,
            signalling_ms: 0.0,
            vm_pause_ms,
        })
    }
}

/// Returns the options of `virsh migrate` for an agent's limits and additional flags.
fn virsh_options(limits: &AgentOptions) -> Vec<String> {
    let mut options = Vec::new();
    if limits.bandwidth_mib > 0 {
        options.extend(["--bandwidth".to_owned(), limits.bandwidth_mib.to_string()]);
    }
    if let Some(connections) = limits.parallel_connections.filter(|&count| count > 0) {
        let connections = connections.to_string();
        options.extend(["--parallel", "--parallel-connections"].map(str::to_owned));
        options.push(connections);
    }
    options.extend(limits.flags.iter().map(|flag| {
        let name = flag.trim_start_matches("VIR_MIGRATE_").to_lowercase();
        format!("--{}", name.replace('_', "-"))
    }));
    options
}

/// Durations of a migration, milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Times {
    signalling_ms: f64,
    /// From the start of the migration to the pause.
    copy_ms: f64,
    vm_pause_ms: f64,
    total_ms: f64,
}

impl Times {
    /// Returns a row with these durations.
    pub(super) fn row(&self) -> RunRow {
        RunRow {
            signalling_ms: self.signalling_ms,
            copy_ms: self.copy_ms,
            vm_pause_ms: self.vm_pause_ms,
            total_ms: self.total_ms,
            ..RunRow::default()
        }
    }

    /// Returns the phases after a request. The packets show when the guest moved: the last arrival
    /// at the source ends the copy, and the first arrival at the destination ends the switch.
    pub(super) fn phases(&self, asked_ns: u64, arrivals: &[Arrival]) -> Vec<Phase> {
        // The conversion is exact below 2^53 ns, and no migration takes so long.
        let ns = |ms: f64| (ms * 1e6) as u64;
        let phase = |name: &str, from_ns: u64, to_ns: u64| Phase {
            name: name.to_owned(),
            from_ns,
            to_ns,
        };
        let mut phases = vec![phase(
            "signalling",
            asked_ns,
            asked_ns + ns(self.signalling_ms),
        )];
        let left = arrivals.iter().rev().find(|arrival| arrival.host == 0);
        let came = arrivals.iter().find(|arrival| arrival.host == 1);
        if let (Some(left), Some(came)) = (left, came) {
            let copy_ns = left.host_ns.saturating_sub(ns(self.copy_ms)).max(asked_ns);
            phases.push(phase("copy", copy_ns, left.host_ns));
            phases.push(phase("switch", left.host_ns, came.host_ns));
        }
        phases
    }
}

/// Reads a duration from `virsh domjobinfo` by its name, which differs with `--rawstats`.
fn statistic(job: &str, raw: &str, shown: &str) -> Option<f64> {
    job.lines().find_map(|line| {
        let (key, value) = line.split_once(':')?;
        let key = key.trim();
        (key == raw || key == shown).then(|| {
            let number = value.split_whitespace().next();
            number.and_then(|number| number.parse().ok())
        })?
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn virsh_is_told_what_an_agent_would_tell_libvirt() {
        assert!(virsh_options(&AgentOptions::DEFAULT).is_empty());
        let limits = AgentOptions {
            bandwidth_mib: 100,
            parallel_connections: Some(2),
            flags: &["VIR_MIGRATE_AUTO_CONVERGE"],
            ..AgentOptions::DEFAULT
        };
        assert_eq!(
            virsh_options(&limits).join(" "),
            "--bandwidth 100 --parallel --parallel-connections 2 --auto-converge"
        );
    }

    #[test]
    fn times_are_read_from_job_statistics() {
        let downtime = |job| statistic(job, "downtime", "Total downtime");
        assert_eq!(
            downtime("Job type:  Completed\nTotal downtime:   157 ms\n"),
            Some(157.0)
        );
        assert_eq!(downtime("operation: 5\ndowntime: 98\n"), Some(98.0));
        assert_eq!(downtime("Job type: None\n"), None);
    }
}
