//! The process of a router or a host inside the lab's namespaces. The `lab` library starts this
//! program; it is not for use by hand.

use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use lab::{mroute, vms};

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let mut arguments = std::env::args().skip(1);
    let (Some(role), Some(settings), None) = (arguments.next(), arguments.next(), arguments.next())
    else {
        bail!("Usage: lab-node router|host SETTINGS");
    };
    match role.as_str() {
        "router" => {
            let settings = serde_json::from_str(&settings).context("Bad settings")?;
            mroute::daemon::run(&settings)
        }
        "host" => {
            let settings = serde_json::from_str(&settings).context("Bad settings")?;
            vms::node::run(&settings)
        }
        _ => bail!("No such role {role:?}: take router or host"),
    }
}
