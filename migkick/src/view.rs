//! Output for the user: progress on standard error, the result on standard output.

use std::io::{self, IsTerminal, Write};
use std::net::Ipv6Addr;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use common::signal::{MigrationProgress, Phase};

/// Progress output: a bar on a terminal, else one line per step.
pub(crate) struct View {
    bar: Option<ProgressBar>,
    step: String,
}

impl View {
    pub(crate) fn new() -> Self {
        let bar = io::stderr().is_terminal().then(|| {
            let bar = ProgressBar::new(0);
            let style = "{spinner} [{bar:30}] {bytes:>10}/{total_bytes} {msg}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        let step = String::new();
        Self { bar, step }
    }

    /// Shows the current step, once.
    pub(crate) fn step(&mut self, step: &str) {
        if self.step == step {
            return;
        }
        step.clone_into(&mut self.step);
        match &self.bar {
            Some(bar) => bar.set_message(self.step.clone()),
            None => eprintln!("{step}"),
        }
    }

    /// Shows the phase and the copied memory.
    pub(crate) fn progress(&mut self, progress: &MigrationProgress) {
        self.step(match progress.phase {
            Phase::Preparing => "The destination joins the VM's multicast addresses",
            Phase::Ready => "The agent starts the migration",
            Phase::Copying => "Memory is copied",
            Phase::Switching => "The VM is paused for the switch",
            Phase::Completed => "The VM runs at the destination",
        });
        if let Some(bar) = &self.bar
            && progress.total_bytes > 0
        {
            bar.set_length(progress.total_bytes);
            bar.set_position(progress.processed_bytes);
        }
    }

    /// Shows a note without disturbing the progress output.
    pub(crate) fn note(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Drop for View {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

/// Result of `migkick search`.
#[derive(Serialize)]
pub(crate) struct SearchReport {
    /// Name of the agent.
    pub(crate) agent: String,
    /// Link-local address of the agent.
    pub(crate) address: Ipv6Addr,
    /// NIC that received the answer: the active one.
    pub(crate) interface: String,
    /// Name of this VM's domain.
    pub(crate) domain: String,
    /// Destinations to which the policy allows the VM to move.
    pub(crate) destinations: Vec<String>,
}

/// Result of `migkick go`. Durations are milliseconds.
#[derive(Serialize)]
pub(crate) struct MoveReport {
    /// Name of this VM's domain.
    pub(crate) domain: String,
    /// Name of the source's agent.
    pub(crate) source: String,
    /// Name of the destination's agent.
    pub(crate) destination: String,
    /// NIC that was active before the migration.
    pub(crate) interface: String,
    /// NIC that was configured for the destination.
    pub(crate) idle_interface: Option<String>,
    /// Address on the idle NIC.
    pub(crate) address: Option<Ipv6Addr>,
    /// Time from the request to the end, on the agent's clock.
    pub(crate) elapsed_ms: u64,
    /// Length of the VM's pause, when the agent knows.
    pub(crate) vm_pause_ms: Option<u64>,
    /// Copied memory, bytes.
    pub(crate) processed_bytes: u64,
    /// Durations of the steps, on the VM's clock, which stops during the pause.
    pub(crate) phases: Vec<PhaseReport>,
}

/// One step of a move.
#[derive(Serialize)]
pub(crate) struct PhaseReport {
    /// `search`, `signalling`, `prepare` (the idle NIC) or `migrate`.
    pub(crate) phase: &'static str,
    /// Duration of the step.
    pub(crate) ms: f64,
}

/// Prints a result as JSON or text.
pub(crate) fn print<T: Serialize>(
    report: &T,
    json: bool,
    rows: impl FnOnce(&T) -> Vec<(&'static str, String)>,
) -> io::Result<()> {
    let mut out = io::stdout().lock();
    if json {
        serde_json::to_writer(&mut out, report)?;
        writeln!(out)?;
    } else {
        for (label, value) in rows(report) {
            writeln!(out, "{label:<13} {value}")?;
        }
    }
    out.flush()
}

impl SearchReport {
    pub(crate) fn rows(&self) -> Vec<(&'static str, String)> {
        let destinations = if self.destinations.is_empty() {
            "none; the agent's policy allows no move".to_owned()
        } else {
            self.destinations.join(", ")
        };
        vec![
            ("agent", self.agent.clone()),
            ("address", format!("{}%{}", self.address, self.interface)),
            ("interface", self.interface.clone()),
            ("domain", self.domain.clone()),
            ("destinations", destinations),
        ]
    }
}

impl MoveReport {
    pub(crate) fn rows(&self) -> Vec<(&'static str, String)> {
        let idle = match (&self.idle_interface, self.address) {
            (Some(interface), Some(address)) => format!("{interface}, {address}"),
            _ => "none".to_owned(),
        };
        let pause = self
            .vm_pause_ms
            .map_or_else(|| "unknown".to_owned(), |ms| format!("{ms} ms"));
        let mut rows = vec![
            (
                "moved",
                format!(
                    "{} from {} to {}",
                    self.domain, self.source, self.destination
                ),
            ),
            ("active NIC", self.interface.clone()),
            ("prepared NIC", idle),
        ];
        for phase in &self.phases {
            rows.push((phase.phase, format!("{:.1} ms", phase.ms)));
        }
        rows.push(("pause", pause));
        rows.push(("elapsed", format!("{} ms", self.elapsed_ms)));
        rows
    }
}
