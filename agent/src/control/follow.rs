//! `roamcast trace`: shows the lines until the operator or the agent ends the trace.

use std::io::{self, Write};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::client::{Client, CommandError};
use super::trace::TraceRequest;
use super::{Reply, request};
use crate::shutdown::Shutdown;

/// Shows decisions as they happen, until SIGINT, SIGTERM, or the end of the agent.
///
/// # Errors
///
/// [`CommandError`]; [`super::client::ClientError::Refused`] carries the agent's reason.
pub fn follow(
    socket: &Path,
    request: TraceRequest,
    json: bool,
    out: &mut impl Write,
) -> Result<(), CommandError> {
    let mut client = Client::connect(socket)?;
    let stopped = Arc::new(AtomicBool::new(false));
    stop_by_signal(&client, &stopped)?;
    let followed = client.follow(&request::Agent::Trace(request), |reply| {
        match reply {
            Reply::Tracing if json => {}
            Reply::Tracing => writeln!(out, "{}", super::table::trace_header())?,
            Reply::Trace(line) if json => {
                serde_json::to_writer(&mut *out, &line).map_err(io::Error::from)?;
                out.write_all(b"\n")?;
            }
            Reply::Trace(line) => writeln!(out, "{}", super::table::trace_line(&line))?,
            _ => return Err(CommandError::Unexpected),
        }
        Ok(out.flush()?)
    });
    match followed {
        Err(CommandError::Client(_)) if stopped.load(Ordering::Relaxed) => Ok(()),
        followed => followed,
    }
}

/// Shuts the connection down on SIGINT or SIGTERM, which ends the answer.
fn stop_by_signal(client: &Client, stopped: &Arc<AtomicBool>) -> Result<(), CommandError> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let mut shutdown = {
        let _context = runtime.enter();
        Shutdown::new()?
    };
    let connection = client.handle()?;
    let stopped = Arc::clone(stopped);
    std::thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(shutdown.recv());
            stopped.store(true, Ordering::Relaxed);
            // The call fails if the connection has ended already.
            let _ = connection.shutdown(std::net::Shutdown::Both);
        })?;
    Ok(())
}
