//! Logs: `tracing` to standard error, as text or JSON.
//!
//! | level | means |
//! |---|---|
//! | error | something that was asked for failed; someone must act |
//! | warn | something is wrong, the agent goes on |
//! | info | rare changes of state: a VM came, a migration ended |
//! | debug, trace | for developers |
//!
//! A log whose reader stands still or goes away stops nobody (`lines`), and names of others make no
//! lines of their own (`fields`).

mod fields;
mod lines;

use std::io::{self, IsTerminal};
use std::sync::OnceLock;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};
use fields::PlainFields;
use lines::Lines;

/// Environment variable that goes before the configured level.
pub const ENVIRONMENT: &str = "ROAMCAST_LOG";

/// How long the end of the process waits for the reader of its log.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The process's own.
static LINES: OnceLock<Lines> = OnceLock::new();

/// Why logs cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is none.
    #[error("\"{level}\" in {place} is no log level; write info, or info,roamcast::proto=debug")]
    Level {
        /// What was given.
        level: String,
        /// Where.
        place: &'static str,
        /// Why.
        source: tracing_subscriber::filter::ParseError,
    },
    /// They are set up already.
    #[error("The logs are set up already")]
    Again,
    /// The thread that writes them cannot be started.
    #[error("Cannot start a thread for the log: {0}; the system has no room for it")]
    Thread(io::Error),
}

/// The logs of the process; when it is dropped, their last lines are written.
#[derive(Debug)]
#[must_use = "without it the last lines are lost"]
pub struct Logs(());

impl Drop for Logs {
    fn drop(&mut self) {
        if let Some(lines) = LINES.get() {
            lines.flush(LAST_LINES);
        }
    }
}

/// Lines of the log that were dropped, because its reader stood still or was away.
pub fn dropped() -> u64 {
    LINES.get().map_or(0, Lines::dropped)
}

/// Checks what [`init`] would be given.
///
/// # Errors
///
/// [`TelemetryError::Level`].
pub fn check(log: &Log) -> Result<(), TelemetryError> {
    filter(log).map(drop)
}

/// Sets the logs up for the whole process, once.
///
/// # Errors
///
/// [`TelemetryError`]: the level is none, it is the second time, or there is no room for a thread.
pub fn init(log: &Log) -> Result<Logs, TelemetryError> {
    let filter = filter(log)?;
    let lines = Lines::start(io::stderr()).map_err(TelemetryError::Thread)?;
    LINES
        .set(lines.clone())
        .map_err(|_| TelemetryError::Again)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        // They would go to standard error past the lines.
        .log_internal_errors(false)
        .with_writer(lines);
    match log.format {
        LogFormat::Text => builder.fmt_fields(PlainFields).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|_| TelemetryError::Again)?;
    Ok(Logs(()))
}

fn filter(log: &Log) -> Result<EnvFilter, TelemetryError> {
    let (level, place) = match std::env::var(ENVIRONMENT) {
        Ok(level) => (level, ENVIRONMENT),
        Err(_) => (log.level.clone(), "log.level"),
    };
    EnvFilter::try_new(&level).map_err(|source| TelemetryError::Level {
        level,
        place,
        source,
    })
}
