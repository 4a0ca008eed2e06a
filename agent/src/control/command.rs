//! The operator's commands: send a request to the agent and print the answer.
//!
//! Commands write data to `out` (standard output), progress and diagnostics to standard error.

use std::io::{self, IsTerminal, Write};
use std::path::Path;
use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

use super::client::{Client, CommandError};
use super::report::{MigrationPhase, MigrationRow};
use super::request::Table;
use super::{Progress, Reply, request, table};

/// Prints the state of a role.
///
/// # Errors
///
/// [`CommandError`].
pub fn status(socket: &Path, json: bool, out: &mut impl Write) -> Result<(), CommandError> {
    let mut status = None;
    // Every role knows this line.
    let request = request::Agent::Status;
    Client::connect(socket)?.ask(&request, |reply| status = Some(reply))?;
    match status {
        Some(Reply::Status(status)) => print(out, &status, json, |it| table::status(it)),
        Some(Reply::RelayStatus(status)) => print(out, &status, json, |it| table::relay_status(it)),
        Some(Reply::McsStatus(status)) => print(out, &status, json, |it| table::mcs_status(it)),
        Some(Reply::ImsStatus(status)) => print(out, &status, json, |it| table::ims_status(it)),
        _ => Err(CommandError::Unexpected),
    }
}

/// Requests a table and prints it.
///
/// # Errors
///
/// [`CommandError`].
pub fn show(
    socket: &Path,
    table: Table,
    json: bool,
    out: &mut impl Write,
) -> Result<(), CommandError> {
    let mut client = Client::connect(socket)?;
    let request = table.request();
    if json {
        client.copy_rows(table, out)?;
        out.flush()?;
        return Ok(());
    }
    match table {
        Table::Listeners => {
            let rows = rows(&mut client, &request, |reply| match reply {
                Reply::Listeners(rows) => Some(rows),
                _ => None,
            })?;
            print(out, &rows, false, |rows| table::listeners(rows))
        }
        Table::Streams => {
            let rows = rows(&mut client, &request, |reply| match reply {
                Reply::Streams(rows) => Some(rows),
                _ => None,
            })?;
            print(out, &rows, false, |rows| table::streams(rows))
        }
        Table::Relays => {
            let rows = rows(&mut client, &request, |reply| match reply {
                Reply::Relays(rows) => Some(rows),
                _ => None,
            })?;
            print(out, &rows, false, |rows| table::relays(rows))
        }
        Table::Migrations => {
            let rows = migrations(&mut client)?;
            print(out, &rows, false, |rows| table::migrations(rows))
        }
    }
}

/// Migrates a domain, shows progress on standard error, and prints the migration's record.
///
/// # Errors
///
/// [`CommandError`]; [`super::client::ClientError::Refused`] carries the agent's reason.
pub fn migrate(
    socket: &Path,
    domain: &str,
    destination: &str,
    json: bool,
    out: &mut impl Write,
) -> Result<(), CommandError> {
    let mut client = Client::connect(socket)?;
    let mut view = ProgressView::new(io::stderr().is_terminal());
    let request = request::Agent::Migrate {
        domain: domain.to_owned(),
        destination: destination.to_owned(),
    };
    let mut record = None;
    let result = client.ask(&request, |reply| match reply {
        Reply::Progress(progress) => view.update(progress),
        Reply::Done { migration } => record = Some(migration),
        _ => {}
    });
    view.finish();
    result?;
    let number = record.ok_or(CommandError::Unexpected)?;
    let row = migrations(&mut client)?
        .into_iter()
        .find(|row| row.migration == number)
        .ok_or(CommandError::Unexpected)?;
    print(out, &row, json, |row| {
        table::migrations(std::slice::from_ref(row))
    })
}

/// Stops a migration in progress.
///
/// # Errors
///
/// [`CommandError`]; [`super::client::ClientError::Refused`] carries the agent's reason.
pub fn abort(socket: &Path, domain: &str) -> Result<(), CommandError> {
    let request = request::Agent::Abort {
        domain: domain.to_owned(),
    };
    Client::connect(socket)?.ask(&request, |_| {})?;
    Ok(())
}

fn migrations(client: &mut Client) -> Result<Vec<MigrationRow>, CommandError> {
    rows(client, &request::Agent::Migrations, |reply| match reply {
        Reply::Migrations(rows) => Some(rows),
        _ => None,
    })
}

fn rows<T>(
    client: &mut Client,
    request: &request::Agent,
    part: impl Fn(Reply) -> Option<Vec<T>>,
) -> Result<Vec<T>, CommandError> {
    let mut all = Vec::new();
    let mut unexpected = false;
    client.ask(request, |reply| match part(reply) {
        Some(rows) => all.extend(rows),
        None => unexpected = true,
    })?;
    if unexpected {
        return Err(CommandError::Unexpected);
    }
    Ok(all)
}

/// Prints data as JSON or as a table.
pub(crate) fn print<T: Serialize>(
    out: &mut impl Write,
    data: &T,
    json: bool,
    render: impl Fn(&T) -> String,
) -> Result<(), CommandError> {
    if json {
        serde_json::to_writer(&mut *out, data).map_err(io::Error::from)?;
        out.write_all(b"\n")?;
    } else {
        writeln!(out, "{}", render(data).trim_end())?;
    }
    out.flush()?;
    Ok(())
}

/// Progress for a person: a bar on a terminal, a line for each phase elsewhere.
struct ProgressView {
    bar: Option<ProgressBar>,
    phase: Option<MigrationPhase>,
}

impl ProgressView {
    fn new(terminal: bool) -> Self {
        let bar = terminal.then(|| {
            let bar = ProgressBar::new(0);
            let style = "{spinner} {msg:10} [{bar:40}] {bytes}/{total_bytes} {elapsed}";
            if let Ok(style) = ProgressStyle::with_template(style) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.enable_steady_tick(Duration::from_millis(100));
            bar
        });
        Self { bar, phase: None }
    }

    fn update(&mut self, progress: Progress) {
        let changed = self.phase.replace(progress.phase) != Some(progress.phase);
        match &self.bar {
            Some(bar) => {
                bar.set_message(progress.phase.as_str());
                bar.set_length(progress.total_bytes);
                bar.set_position(progress.processed_bytes);
            }
            None if changed => drop(writeln!(io::stderr(), "{}", progress.phase.as_str())),
            None => {}
        }
    }

    fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
