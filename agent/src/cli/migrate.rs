//! `roamcast migrate` and `roamcast abort`.

use std::io::Write;

use clap::Args;

use super::SocketArgs;
use crate::control::command;

/// Arguments of `roamcast migrate`.
#[derive(Clone, Debug, Args)]
pub struct MigrateArgs {
    /// Name or UUID of the domain.
    pub domain: String,
    /// Name of the destination's agent.
    pub destination: String,
    /// Print the migration's record as JSON.
    #[arg(long)]
    pub json: bool,
    /// Which socket to ask.
    #[command(flatten)]
    pub socket: SocketArgs,
}

/// Arguments of `roamcast abort`.
#[derive(Clone, Debug, Args)]
pub struct AbortArgs {
    /// Name or UUID of the domain.
    pub domain: String,
    /// Which socket to ask.
    #[command(flatten)]
    pub socket: SocketArgs,
}

/// Migrates a domain, and follows the migration to its end.
pub(super) fn migrate(args: &MigrateArgs, out: &mut impl Write) -> anyhow::Result<()> {
    let (domain, destination) = (&args.domain, &args.destination);
    command::migrate(&args.socket.socket, domain, destination, args.json, out)?;
    Ok(())
}

/// Stops a migration.
pub(super) fn abort(args: &AbortArgs) -> anyhow::Result<()> {
    command::abort(&args.socket.socket, &args.domain)?;
    Ok(())
}
