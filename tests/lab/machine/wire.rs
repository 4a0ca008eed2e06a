//! Messages between the machine and the outside over the machine's virtio-serial port, in the
//! frames of the guests' control channel ([`crate::guest::wire::frame`]).

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use serde::{Deserialize, Serialize};

use crate::guest::wire::frame::{Frame, MAX_PAYLOAD, frame};

/// Name of the virtio-serial port.
pub const PORT_NAME: &str = "org.roamcast.machine.0";

/// Job for the machine; the first message to the machine.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Job {
    /// Program and arguments.
    pub command: Vec<String>,
    /// Working directory.
    pub directory: PathBuf,
    /// The whole environment.
    pub environment: Vec<(String, String)>,
    /// Directory of the kernel's modules, for `/lib/modules/RELEASE`.
    pub modules: PathBuf,
    /// Modules to load before the command starts, if the kernel has them.
    pub load: Vec<String>,
    /// Mount point of the writable directory, if there is one.
    pub output: Option<PathBuf>,
    /// Rows and columns of the command's terminal; `None` for no terminal.
    pub terminal: Option<(u16, u16)>,
}

/// A message to the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ToMachine {
    /// The job to run.
    Job(Job),
    /// Bytes typed at the terminal.
    Input(Vec<u8>),
}

/// A message from the machine.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum FromMachine {
    /// The machine has booted and starts the command.
    Started,
    /// A message of the machine itself, such as a missing module.
    Notice(String),
    /// Bytes from the command's standard output, or from its terminal.
    Output(Vec<u8>),
    /// Bytes from the command's standard error.
    Errors(Vec<u8>),
    /// The command has ended with this code, as in a shell. No message follows.
    Exit(u8),
}

const JOB: u8 = 1;
const INPUT: u8 = 2;
const STARTED: u8 = 3;
const NOTICE: u8 = 4;
const OUTPUT: u8 = 5;
const ERRORS: u8 = 6;
const EXIT: u8 = 7;

impl ToMachine {
    /// Returns the message as a frame.
    ///
    /// # Errors
    ///
    /// When the message is too long for a frame.
    pub fn encode(&self) -> Result<Vec<u8>> {
        match self {
            Self::Job(job) => encode(JOB, &serde_json::to_vec(job)?),
            Self::Input(bytes) => encode(INPUT, bytes),
        }
    }

    /// Reads a message from a frame.
    ///
    /// # Errors
    ///
    /// When the frame has another kind, or its job is malformed.
    pub fn decode(frame: &Frame) -> Result<Self> {
        match frame.kind {
            JOB => {
                let job = serde_json::from_slice(&frame.payload).context("The job is malformed")?;
                Ok(Self::Job(job))
            }
            INPUT => Ok(Self::Input(frame.payload.clone())),
            kind => bail!("The outside sent a message of unknown kind {kind}"),
        }
    }
}

impl FromMachine {
    /// Returns the message as a frame.
    ///
    /// # Errors
    ///
    /// When the message is too long for a frame.
    pub fn encode(&self) -> Result<Vec<u8>> {
        match self {
            Self::Started => encode(STARTED, &[]),
            Self::Notice(text) => encode(NOTICE, text.as_bytes()),
            Self::Output(bytes) => encode(OUTPUT, bytes),
            Self::Errors(bytes) => encode(ERRORS, bytes),
            Self::Exit(code) => encode(EXIT, &[*code]),
        }
    }

    /// Reads a message from a frame.
    ///
    /// # Errors
    ///
    /// When the frame has another kind, or is an end without a code.
    pub fn decode(frame: &Frame) -> Result<Self> {
        let payload = || frame.payload.clone();
        Ok(match frame.kind {
            STARTED => Self::Started,
            NOTICE => Self::Notice(String::from_utf8_lossy(&frame.payload).into_owned()),
            OUTPUT => Self::Output(payload()),
            ERRORS => Self::Errors(payload()),
            EXIT => match frame.payload.as_slice() {
                [code] => Self::Exit(*code),
                other => bail!("The machine told an end with {} bytes", other.len()),
            },
            kind => bail!("The machine sent a message of unknown kind {kind}"),
        })
    }
}

fn encode(kind: u8, payload: &[u8]) -> Result<Vec<u8>> {
    if payload.len() > MAX_PAYLOAD {
        bail!(
            "A message of {} bytes does not fit into a frame of {MAX_PAYLOAD}: shorten the command \
             or its environment",
            payload.len()
        );
    }
    Ok(frame(kind, 0, 0, payload))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::guest::wire::frame::Decoder;

    fn frames(bytes: &[u8]) -> Vec<Frame> {
        let mut decoder = Decoder::default();
        decoder.push(bytes);
        std::iter::from_fn(|| decoder.poll_frame()).collect()
    }

    #[test]
    fn messages_come_out_as_they_went_in() {
        let messages = [
            FromMachine::Started,
            FromMachine::Notice("no module x".to_owned()),
            FromMachine::Output(vec![0, 255, b'\n']),
            FromMachine::Errors(Vec::new()),
            FromMachine::Exit(137),
        ];
        let bytes: Vec<u8> = messages
            .iter()
            .flat_map(|message| message.encode().unwrap())
            .collect();
        let decoded: Vec<_> = frames(&bytes)
            .iter()
            .map(|frame| FromMachine::decode(frame).unwrap())
            .collect();
        assert_eq!(decoded, messages);

        let job = ToMachine::Job(Job {
            command: vec!["echo".to_owned(), "it's two\nlines".to_owned()],
            directory: "/tmp".into(),
            environment: vec![("KEY".to_owned(), "a b".to_owned())],
            modules: "/m".into(),
            load: vec!["tun".to_owned()],
            output: None,
            terminal: Some((24, 80)),
        });
        let bytes = job.encode().unwrap();
        assert_eq!(ToMachine::decode(&frames(&bytes)[0]).unwrap(), job);
    }

    #[test]
    fn a_message_that_fits_into_no_frame_is_refused() {
        let error = ToMachine::Input(vec![0; MAX_PAYLOAD + 1])
            .encode()
            .unwrap_err();
        assert!(error.to_string().contains("65537 bytes"), "{error}");
    }

    #[test]
    fn an_end_without_a_code_is_an_error() {
        let bytes = encode(EXIT, &[]).unwrap();
        assert!(FromMachine::decode(&frames(&bytes)[0]).is_err());
    }
}
