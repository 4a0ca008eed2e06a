//! Logs: `tracing` to standard error, as text or JSON.
//!
//! | level | means |
//! |---|---|
//! | error | something that was asked for failed; someone must act |
//! | warn | something is wrong, the agent goes on |
//! | info | rare changes of state: a VM came, a migration ended |
//! | debug, trace | for developers |

use std::io::{self, IsTerminal};

use tracing_subscriber::EnvFilter;

use crate::config::{Log, LogFormat};

/// Environment variable that goes before the configured level.
pub const ENVIRONMENT: &str = "ROAMCAST_LOG";

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
/// [`TelemetryError`]: the level is none, or it is the second time.
pub fn init(log: &Log) -> Result<(), TelemetryError> {
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter(log)?)
        .with_ansi(io::stderr().is_terminal())
        .with_writer(io::stderr);
    match log.format {
        LogFormat::Text => builder.try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    }
    .map_err(|_| TelemetryError::Again)
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
