//! A TCP application that sends back all received bytes: the guest's end of the sessions that the
//! host measures.
//!
//! `guest echo listen PORT` serves every client; `guest echo connect ADDRESS PORT` opens one
//! session. When a session breaks, `connect` ends with an error, and `listen` prints the error.

use std::{
    io::{Read as _, Write as _},
    net::{Ipv6Addr, TcpListener, TcpStream},
    thread,
};

use anyhow::{Context as _, Result, bail};
use lab::guest::sys;

/// Runs `listen` or `connect`.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["listen", port] => {
            let port: u16 = port.parse().context("Not a port")?;
            let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, port))
                .with_context(|| format!("Cannot listen on port {port}"))?;
            println!("listens");
            for stream in listener.incoming() {
                let stream = stream.context("Cannot accept a session")?;
                thread::spawn(move || {
                    if let Err(error) = echo(stream) {
                        eprintln!("guest: {error:#}");
                    }
                });
            }
            Ok(())
        }
        ["connect", address, port] => {
            let address: Ipv6Addr = address.parse().context("Not an address")?;
            let port: u16 = port.parse().context("Not a port")?;
            let stream = TcpStream::connect((address, port))
                .with_context(|| format!("Cannot open a session to {address}"))?;
            println!("connected");
            echo(stream)
        }
        _ => bail!("Usage: guest echo listen PORT | guest echo connect ADDRESS PORT"),
    }
}

/// Sends back all received bytes until the other side ends the session. The thread has priority
/// over the receivers; otherwise a session would stall for as long as an emulated CPU needs to
/// catch up with the stream.
fn echo(mut stream: TcpStream) -> Result<()> {
    if let Err(error) = sys::run_before_all() {
        eprintln!("guest: The echo has no priority: {error}");
    }
    stream.set_nodelay(true)?;
    let mut buffer = [0; 4096];
    loop {
        let length = stream.read(&mut buffer).context("The session broke")?;
        if length == 0 {
            return Ok(());
        }
        stream
            .write_all(&buffer[..length])
            .context("The session broke")?;
    }
}
