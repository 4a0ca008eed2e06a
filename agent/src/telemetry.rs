//! Logs: `tracing` to standard error, as text or JSON.
//!
//! | level | means |
//! |---|---|
//! | error | an operation failed; someone must act |
//! | warn | something is wrong; the agent continues |
//! | info | rare changes of state: a VM arrived, a migration ended |
//! | debug, trace | for developers |
//!
//! A log reader that stops or leaves blocks no thread (`lines`). Names that others chose cannot
//! make lines of their own (`fields`).

mod fields;
mod lines;

use std::io::{self, IsTerminal};
use std::sync::OnceLock;
use std::time::Duration;

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};
use fields::PlainFields;
use lines::Lines;

/// Environment variable that overrides the configured level.
pub const ENVIRONMENT: &str = "ROAMCAST_LOG";

/// Longest wait at the end of the process for the log's reader.
const LAST_LINES: Duration = Duration::from_secs(1);

/// Lines of this process.
static LINES: OnceLock<Lines> = OnceLock::new();

/// Why the log cannot be set up.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    /// The level is invalid.
    #[error("\"{level}\" in {place} is no log level; write info, or info,roamcast::proto=debug")]
    Level {
        /// Level as given.
        level: String,
        /// Place of the level: the configuration or the environment.
        place: &'static str,
        /// Error of the parser.
        source: tracing_subscriber::filter::ParseError,
    },
    /// The log is set up already.
    #[error("The logs are set up already")]
    Again,
    /// The system refuses the writing thread.
    #[error("Cannot start a thread for the log: {0}; the system has no room for it")]
    Thread(io::Error),
}

/// The log of the process. Dropping the value writes the last lines.
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

/// Returns the number of dropped lines: the reader had stopped or left.
pub fn dropped() -> u64 {
    LINES.get().map_or(0, Lines::dropped)
}

/// Checks the configuration of the log, as [`init`] does.
///
/// # Errors
///
/// [`TelemetryError::Level`].
pub fn check(log: &Log) -> Result<(), TelemetryError> {
    filter(log).map(drop)
}

/// Sets up the log for the whole process, once.
///
/// # Errors
///
/// [`TelemetryError`]: the level is invalid, the log is set up already, or the system refuses a
/// thread.
pub fn init(log: &Log) -> Result<Logs, TelemetryError> {
    let filter = filter(log)?;
    let lines = Lines::start(io::stderr()).map_err(TelemetryError::Thread)?;
    LINES
        .set(lines.clone())
        .map_err(|_| TelemetryError::Again)?;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_ansi(io::stderr().is_terminal())
        // Internal errors would go to standard error and bypass the lines.
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
