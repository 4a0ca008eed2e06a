//! `roamcast agent`, `relay`, `mcs` and `ims`: load the configuration, set up the log and run the
//! role until a signal stops it.

use std::io::{self, Write};
use std::path::{Path, PathBuf};

use clap::Args;
use tokio::runtime::Runtime;

use crate::config::{ConfigError, Log};
use crate::{runtime, telemetry};

/// Arguments of a role.
#[derive(Clone, Debug, Args)]
pub struct RoleArgs {
    /// Configuration file.
    #[arg(long, value_name = "FILE", env = "ROAMCAST_CONFIG")]
    pub config: PathBuf,
    /// Check the configuration file, print OK or the error, and exit.
    #[arg(long)]
    pub check: bool,
}

#[cfg(feature = "agent")]
pub(super) fn agent(args: &RoleArgs, out: &mut impl Write) -> anyhow::Result<()> {
    use crate::config::Config;
    use crate::hypervisor::trust;
    let run = |config| Ok(Runtime::new()?.block_on(runtime::agent::run(config))?);
    let advise = |config: &Config| trust::advice(Path::new("/"), &config.tls.ca);
    run_role(args, Config::load, |config| &config.log, advise, run, out)
}

#[cfg(feature = "relay")]
pub(super) fn relay(args: &RoleArgs, out: &mut impl Write) -> anyhow::Result<()> {
    use crate::config::RelayConfig;
    let run = |config| Ok(Runtime::new()?.block_on(runtime::relay::run(config))?);
    run_role(
        args,
        RelayConfig::load,
        |config| &config.log,
        |_| Vec::new(),
        run,
        out,
    )
}

#[cfg(feature = "mcs")]
pub(super) fn mcs(args: &RoleArgs, out: &mut impl Write) -> anyhow::Result<()> {
    use crate::config::McsConfig;
    let run = |config| Ok(Runtime::new()?.block_on(runtime::mcs::run(config))?);
    run_role(
        args,
        McsConfig::load,
        |config| &config.log,
        |_| Vec::new(),
        run,
        out,
    )
}

#[cfg(feature = "ims")]
pub(super) fn ims(args: &RoleArgs, out: &mut impl Write) -> anyhow::Result<()> {
    use crate::config::ImsConfig;
    let run = |config| Ok(Runtime::new()?.block_on(runtime::ims::run(config))?);
    run_role(
        args,
        ImsConfig::load,
        |config| &config.log,
        |_| Vec::new(),
        run,
        out,
    )
}

/// Loads the configuration, sets up the log and runs a role. With `--check`, prints OK and advice
/// for the operator and starts nothing.
pub(super) fn run_role<C>(
    args: &RoleArgs,
    load: impl FnOnce(&Path) -> Result<C, ConfigError>,
    log: impl FnOnce(&C) -> &Log,
    advise: impl FnOnce(&C) -> Vec<String>,
    run: impl FnOnce(C) -> anyhow::Result<()>,
    out: &mut impl Write,
) -> anyhow::Result<()> {
    let config = load(&args.config)?;
    let log = log(&config);
    telemetry::check(log)?;
    if args.check {
        for advice in advise(&config) {
            // Standard error may be closed.
            let _ = writeln!(io::stderr(), "Warning: {advice}");
        }
        writeln!(out, "OK")?;
        return Ok(());
    }
    let logs = telemetry::init(log)?;
    let result = run(config);
    // Flush the log before the error sentence is printed.
    drop(logs);
    result
}
