//! Migration of a VM that runs a node: the node chooses the address and configures the NIC; this
//! module reports the progress of the migration to the node.

use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use crate::interface::Interface;
use common::signal::{Code, MigrationProgress, MigrationReady, MigrationResponse, Phase};

use crate::GoArgs;
use crate::node::control::{Answer, ControlError, Prepare, Prepared, Request, SOCKET, ask};

/// How often the node prepares again because another node has the address.
const TRIES: u32 = 4;

/// A node prepared for the migration. Dropping the value tells the node how the migration ended.
pub(crate) struct Mobile {
    socket: PathBuf,
    interface: Interface,
    request: Request,
    prepared: Prepared,
    /// How often the node may still prepare again.
    tries: u32,
    stage: Stage,
}

/// Progress of the migration.
#[derive(Clone, Copy)]
enum Stage {
    /// The agents do not know yet that the VM is ready, so they cannot migrate the VM.
    Preparing,
    /// The agents may migrate the VM at any time.
    Ready {
        /// Whether the node knows that the switch is near.
        near: bool,
        /// Whether the agents know that they may translate.
        translate: bool,
    },
    /// The agents have aborted the migration.
    Off {
        /// Whether another node has the new address.
        taken: bool,
    },
    /// The outcome will stay unknown to this program.
    Lost,
    /// The VM has arrived.
    Over,
}

impl Mobile {
    /// Returns the NIC that has the node's active address; `None` without a node or an address.
    pub(crate) fn active() -> Result<Option<String>, ControlError> {
        Self::active_at(Path::new(SOCKET))
    }

    fn active_at(socket: &Path) -> Result<Option<String>, ControlError> {
        match ask(socket, &Request::Status) {
            Ok(Answer::Status(status)) => Ok(status.interface),
            Ok(_) => Err(ControlError::Answer),
            Err(ControlError::NoNode) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Asks the node to prepare; `None` without a node.
    pub(crate) fn prepare(
        args: &GoArgs,
        interface: &Interface,
        response: &MigrationResponse,
    ) -> Result<Option<Self>, ControlError> {
        Self::prepare_at(Path::new(SOCKET), args, interface, response)
    }

    fn prepare_at(
        socket: &Path,
        args: &GoArgs,
        interface: &Interface,
        response: &MigrationResponse,
    ) -> Result<Option<Self>, ControlError> {
        let request = Request::Prepare(Prepare {
            interface: interface.name.clone(),
            prefix: Ipv6Addr::from(*response.prefix),
            length: response.prefix_length,
            agent: Ipv6Addr::from(*response.agent_address),
            router: None,
            identifier: args.interface_identifier,
            secret: args.secret.clone(),
        });
        match ask(socket, &request) {
            Ok(Answer::Prepared(prepared)) => Ok(Some(Self {
                socket: socket.to_owned(),
                interface: interface.clone(),
                request,
                prepared,
                tries: TRIES,
                stage: Stage::Preparing,
            })),
            Ok(_) => Err(ControlError::Answer),
            Err(ControlError::NoNode) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Name of the configured NIC.
    pub(crate) fn name(&self) -> &str {
        &self.interface.name
    }

    /// Address of the VM at the destination.
    pub(crate) fn address(&self) -> Ipv6Addr {
        self.prepared.address
    }

    /// Whether all correspondents know the new address, so that they accept packets that the VM
    /// sends after the migration before its node has switched. Where another node has the address,
    /// the node takes the next one, up to [`TRIES`] times.
    pub(crate) fn is_known(&mut self) -> Result<bool, ControlError> {
        match ask(&self.socket, &Request::Known)? {
            Answer::Known(known) => Ok(known),
            Answer::Taken if self.tries > 0 => {
                self.tries -= 1;
                self.prepare_again()?;
                Ok(false)
            }
            Answer::Taken => Err(ControlError::Taken(self.prepared.address)),
            _ => Err(ControlError::Answer),
        }
    }

    /// Another node has the address: the node takes the next one.
    fn prepare_again(&mut self) -> Result<(), ControlError> {
        ask(&self.socket, &Request::Aborted { taken: true })?;
        match ask(&self.socket, &self.request)? {
            Answer::Prepared(prepared) => {
                self.prepared = prepared;
                Ok(())
            }
            _ => Err(ControlError::Answer),
        }
    }

    /// Returns the message for the agents. From now on the node expects the migration.
    pub(crate) fn ready(&mut self) -> Result<MigrationReady, ControlError> {
        let translate = self.ask_ready(false)?;
        let near = false;
        self.stage = Stage::Ready { near, translate };
        Ok(self.message(translate))
    }

    /// Asks the node whether the agents may translate packets from the VM's old addresses.
    fn ask_ready(&self, near: bool) -> Result<bool, ControlError> {
        match ask(&self.socket, &Request::Ready { near })? {
            Answer::Ready { translate } => Ok(translate),
            _ => Err(ControlError::Answer),
        }
    }

    fn message(&self, translate: bool) -> MigrationReady {
        let forward = self.prepared.forward.iter();
        MigrationReady {
            address: Some(self.prepared.address.octets().into()),
            mac: Some(self.prepared.mac.into()),
            forward: forward.map(|it| it.octets().into()).collect(),
            forward_s: self.prepared.forward_s,
            translate,
        }
    }

    /// Tells the node when the switch is near, so that it polls more often. Returns a new message
    /// for the agents when the VM's peers have learnt its new address.
    pub(crate) fn progress(&mut self, progress: &MigrationProgress) -> Option<MigrationReady> {
        let Stage::Ready { near, translate } = self.stage else {
            return None;
        };
        let is_near = match progress.phase {
            Phase::Preparing | Phase::Ready => false,
            // The last tenth takes longest, because the VM writes to its memory during the copy.
            Phase::Copying => {
                let left = progress
                    .total_bytes
                    .saturating_sub(progress.processed_bytes);
                progress.total_bytes > 0 && left <= progress.total_bytes / 10
            }
            Phase::Switching | Phase::Completed => true,
        };
        if translate && (near || !is_near) {
            return None;
        }
        // Without an answer of the node, the node notices the arrival slightly later, and packets
        // that the VM sends until then are lost.
        let near = near || is_near;
        let may_translate = translate | self.ask_ready(near).ok()?;
        self.stage = Stage::Ready {
            near,
            translate: may_translate,
        };
        (may_translate && !translate).then(|| self.message(true))
    }

    /// Handles an abort by the agents, with the code of their reason.
    pub(crate) fn refused(&mut self, code: Code) {
        let taken = code.wants_another_address();
        self.stage = Stage::Off { taken };
    }

    /// Handles silence of the agents. When the agents know that the VM is ready, it may be too late
    /// to stop the migration.
    pub(crate) fn lost(&mut self) {
        if let Stage::Ready { .. } = self.stage {
            self.stage = Stage::Lost;
        }
    }

    /// Handles the arrival as reported by the agents. Returns whether the node has noticed it too.
    pub(crate) fn completed(mut self) -> Result<bool, ControlError> {
        self.stage = Stage::Over;
        ask(&self.socket, &Request::Completed)?;
        match ask(&self.socket, &Request::Status)? {
            Answer::Status(status) => Ok(status.core.moa == Some(self.prepared.address)),
            _ => Err(ControlError::Answer),
        }
    }
}

impl Drop for Mobile {
    fn drop(&mut self) {
        let request = match self.stage {
            Stage::Over => return,
            Stage::Lost => Request::Lost,
            Stage::Off { taken } => Request::Aborted { taken },
            Stage::Preparing | Stage::Ready { .. } => Request::Aborted { taken: false },
        };
        if let Err(error) = ask(&self.socket, &request) {
            eprintln!("{:#}", anyhow::Error::new(error));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::identifier::Scheme;
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixListener;
    use std::sync::mpsc;
    use std::thread;
    use tempfile::TempDir;

    const ADDRESS: &str = "2001:db8:2::7";

    /// A node that gives `answers`, and reports the requests.
    fn node(answers: Vec<Answer>) -> (TempDir, mpsc::Receiver<Request>) {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(socket(&folder)).unwrap();
        let (sender, requests) = mpsc::channel();
        thread::spawn(move || {
            for answer in answers {
                let (mut stream, _) = listener.accept().unwrap();
                let mut line = String::new();
                BufReader::new(&stream).read_line(&mut line).unwrap();
                sender.send(serde_json::from_str(&line).unwrap()).unwrap();
                let answer = serde_json::to_string(&answer).unwrap();
                writeln!(stream, "{answer}").unwrap();
            }
        });
        (folder, requests)
    }

    fn socket(folder: &TempDir) -> PathBuf {
        folder.path().join("node.sock")
    }

    fn prepare(socket: &Path) -> Result<Option<Mobile>, ControlError> {
        let args = GoArgs {
            destination: "vms2".to_owned(),
            domain: None,
            idle_interface: None,
            no_configure: false,
            interface_identifier: Scheme::Eui64,
            secret: None,
            json: false,
        };
        let interface = Interface {
            ifindex: 3,
            name: "eth1".to_owned(),
            mac: [2; 6],
            up: true,
        };
        let response = MigrationResponse {
            prefix: [0x20; 16].into(),
            prefix_length: 64,
            agent_address: [0x21; 16].into(),
        };
        Mobile::prepare_at(socket, &args, &interface, &response)
    }

    /// Status of a node at [`ADDRESS`].
    fn status(interface: Option<&str>) -> Answer {
        let core = serde_json::json!({
            "hoa": "fd5e:6d61:74::5", "ifindex": 3, "moa": ADDRESS, "standby": null, "left": [], "stage": null,
            "sequence": 1, "registered": true, "servers": [], "peers": [], "counters": {},
            "interface": interface, "datapath": {},
        });
        Answer::Status(serde_json::from_value(core).unwrap())
    }

    fn prepared() -> Answer {
        Answer::Prepared(Prepared {
            address: ADDRESS.parse().unwrap(),
            mac: [2; 6],
            forward: vec!["2001:db8:1::7".parse().unwrap()],
            forward_s: 30,
        })
    }

    #[test]
    fn node_is_told_how_far_the_move_is() {
        let status = status(Some("eth1"));
        let answers = vec![
            prepared(),
            Answer::Known(false),
            Answer::Known(true),
            Answer::Ready { translate: false },
            Answer::Ready { translate: false },
            Answer::Ready { translate: true },
            Answer::Ready { translate: true },
            Answer::Done,
            status,
        ];
        let (folder, requests) = node(answers);
        let mut mobile = prepare(&socket(&folder)).unwrap().unwrap();
        assert!(!mobile.is_known().unwrap());
        assert!(mobile.is_known().unwrap());
        let ready = mobile.ready().unwrap();
        assert_eq!((ready.forward.len(), ready.forward_s), (1, 30));
        assert!(!ready.translate);
        let told: Vec<_> = [
            (Phase::Copying, 10),
            (Phase::Copying, 20),
            (Phase::Copying, 30),
            (Phase::Copying, 95),
            (Phase::Copying, 85),
            (Phase::Switching, 100),
        ]
        .map(|(phase, processed_bytes)| {
            mobile.progress(&MigrationProgress {
                phase,
                processed_bytes,
                total_bytes: 100,
                elapsed_ms: 0,
                vm_pause_ms: None,
                clock_ns: None,
            })
        })
        .into_iter()
        .flatten()
        .collect();
        let translated = MigrationReady {
            translate: true,
            ..ready
        };
        assert_eq!(told, [translated], "once, when the node says so");
        assert!(mobile.completed().unwrap());
        let requests: Vec<Request> = requests.iter().skip(1).collect();
        let expected = [
            Request::Known,
            Request::Known,
            Request::Ready { near: false },
            Request::Ready { near: false },
            Request::Ready { near: false },
            Request::Ready { near: true },
            Request::Completed,
            Request::Status,
        ];
        assert_eq!(requests, expected);
    }

    #[test]
    fn node_whose_address_another_has_prepares_once_more() {
        let other = Prepared {
            address: "2001:db8:2::8".parse().unwrap(),
            mac: [2; 6],
            forward: Vec::new(),
            forward_s: 30,
        };
        let answers = vec![
            prepared(),
            Answer::Known(false),
            Answer::Taken,
            Answer::Done,
            Answer::Prepared(other.clone()),
            Answer::Known(true),
            Answer::Ready { translate: true },
        ];
        let (folder, requests) = node(answers);
        let mut mobile = prepare(&socket(&folder)).unwrap().unwrap();
        let known: Vec<bool> = (0..3).map(|_| mobile.is_known().unwrap()).collect();
        assert_eq!(known, [false, false, true]);
        let ready = mobile.ready().unwrap();
        assert_eq!(ready.address, Some(other.address.octets().into()));
        assert_eq!(mobile.address(), other.address);
        mobile.stage = Stage::Over;
        let requests: Vec<Request> = requests.try_iter().collect();
        assert_eq!(requests[3], Request::Aborted { taken: true });
        assert_eq!(requests[4], requests[0]);
    }

    #[test]
    fn node_that_finds_every_address_taken_is_not_asked_for_ever() {
        let again = [Answer::Taken, Answer::Done, prepared()];
        let mut answers = vec![prepared()];
        answers.extend((0..TRIES).flat_map(|_| again.clone()));
        answers.push(Answer::Taken);
        answers.push(Answer::Done);
        let (folder, requests) = node(answers);
        let mut mobile = prepare(&socket(&folder)).unwrap().unwrap();
        for _ in 0..TRIES {
            assert!(!mobile.is_known().unwrap());
        }
        let error = mobile.is_known().expect_err("known");
        assert!(error.to_string().contains(ADDRESS), "{error}");
        drop(mobile);
        assert_eq!(
            requests.iter().last(),
            Some(Request::Aborted { taken: false })
        );
    }

    #[test]
    fn node_is_told_that_the_move_is_off_and_whether_the_address_is_taken() {
        for (code, taken) in [
            (Code::HYPERVISOR, false),
            (Code::ADDRESS_TAKEN, true),
            (Code::ADDRESS_OFF_LINK, true),
            (Code::UNSPECIFIED, false),
        ] {
            let (folder, requests) = node(vec![prepared(), Answer::Done]);
            let mut mobile = prepare(&socket(&folder)).unwrap().unwrap();
            mobile.refused(code);
            drop(mobile);
            assert_eq!(requests.iter().last(), Some(Request::Aborted { taken }));
        }
    }

    #[test]
    fn node_goes_on_waiting_where_the_end_is_not_known() {
        let ready = Answer::Ready { translate: false };
        let (folder, requests) = node(vec![prepared(), ready, Answer::Done]);
        let mut mobile = prepare(&socket(&folder)).unwrap().unwrap();
        mobile.ready().unwrap();
        mobile.lost();
        drop(mobile);
        assert_eq!(requests.iter().last(), Some(Request::Lost));
    }

    #[test]
    fn move_that_no_agent_could_begin_is_off() {
        let (folder, requests) = node(vec![prepared(), Answer::Done]);
        let mut mobile = prepare(&socket(&folder)).unwrap().unwrap();
        mobile.lost();
        drop(mobile);
        let off = Request::Aborted { taken: false };
        assert_eq!(requests.iter().last(), Some(off));
    }

    #[test]
    fn active_nic_is_the_one_that_the_node_names() {
        let answers = vec![status(Some("eth0")), status(None)];
        let (folder, _requests) = node(answers);
        let ask = || Mobile::active_at(&socket(&folder)).unwrap();
        assert_eq!(ask().as_deref(), Some("eth0"));
        assert_eq!(ask(), None, "a node without an address");
        let nobody = Mobile::active_at(Path::new("/nonexistent/node.sock"));
        assert_eq!(nobody.unwrap(), None);
    }

    #[test]
    fn without_a_node_there_is_none_and_its_refusal_is_verbatim() {
        assert!(
            prepare(Path::new("/nonexistent/node.sock"))
                .unwrap()
                .is_none()
        );
        let reason = "eth1 is the active NIC of the node; name the other one";
        let (folder, _requests) = node(vec![Answer::Error(reason.to_owned())]);
        let error = prepare(&socket(&folder)).map(drop).expect_err("prepared");
        assert_eq!(error.to_string(), reason);
    }
}
