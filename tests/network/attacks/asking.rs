//! A VM asks for migrations that only an operator may start, and asks without end.

use std::net::{Ipv6Addr, SocketAddrV6, UdpSocket};
use std::time::Duration;

use common::signal::{
    AgentResponse, AgentSearch, MigrationReady, MigrationRequest, PORT, PeerMessage, VmMessage,
};
use support::agent::{Agent, domain};
use support::liar::Liar;
use support::netns::{Namespace, privileged, wait_for};
use support::tap::Guest;

const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 7];
const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// Runs an attack with VM `viewer` and its agent.
fn with_vm(rules: &str, attack: impl FnOnce(&Agent, &Vm) + Send) {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.add_bridge("br0");
    let guest = Guest::start(&host, "br0", "tap0", 0);
    host.ip("link set tap0 address fe:54:00:00:00:07");
    host.run_with_bpffs(|bpffs| {
        let viewer = domain("viewer", 1, "tap0", MAC);
        let agent = Agent::start(bpffs, &[viewer], rules);
        let inner = guest.namespace.ifindex("eth0");
        let socket = guest.namespace.run(|| {
            let socket = UdpSocket::bind((Ipv6Addr::UNSPECIFIED, 0)).unwrap();
            let tick = Duration::from_millis(200);
            socket.set_read_timeout(Some(tick)).unwrap();
            socket
        });
        attack(&agent, &Vm { socket, inner });
    });
}

/// The program inside the VM.
struct Vm {
    socket: UdpSocket,
    inner: u32,
}

impl Vm {
    /// Repeats a message until the expected answer arrives.
    fn until<T>(
        &self,
        transaction: u64,
        message: impl Into<VmMessage>,
        wanted: impl Fn(VmMessage) -> Option<T>,
    ) -> T {
        let bytes = message.into().encode(transaction);
        let to = SocketAddrV6::new(ALL_NODES, PORT, 0, self.inner);
        wait_for("an answer for the VM", || {
            self.socket.send_to(&bytes, to).unwrap();
            let mut answer = [0; 2048];
            let (length, _) = self.socket.recv_from(&mut answer).ok()?;
            match VmMessage::decode(&answer[..length]) {
                Ok((of, message)) if of == transaction => wanted(message),
                _ => None,
            }
        })
    }

    /// Requests a migration. Returns the reason of the refusal.
    fn refusal(&self, transaction: u64) -> String {
        self.until(transaction, request(), |message| match message {
            VmMessage::MigrationAbort(abort) => Some(abort.0.text),
            _ => None,
        })
    }

    fn destinations(&self) -> Vec<String> {
        self.until(1, AgentSearch {}, |message| match message {
            VmMessage::AgentSearchReply(reply) => Some(reply.destinations),
            _ => None,
        })
    }
}

fn request() -> MigrationRequest {
    MigrationRequest {
        destination: "vms2".to_owned(),
        domain: None,
    }
}

/// Accepts the next request as the destination. Returns its transaction number.
fn accept(destination: &mut Liar) -> u64 {
    loop {
        let (transaction, message) = destination.hear();
        if let PeerMessage::AgentRequest(_) = message {
            let response = AgentResponse {
                prefix: [0; 16].into(),
                prefix_length: 64,
                agent_address: [1; 16].into(),
                receptions: vec![],
                copy_tls: false,
            };
            destination.say(transaction, response);
            return transaction;
        }
    }
}

fn rule(by: &str) -> String {
    format!("[[policy.depart]]\ndomains = [\"viewer\"]\ndestinations = [\"vms2\"]\n{by}\n")
}

#[test]
fn nothing_moves_until_the_operator_has_written_a_rule() {
    with_vm("", |agent, vm| {
        assert_eq!(vm.destinations(), Vec::<String>::new());
        let reason = vm.refusal(2);
        assert!(reason.contains("[[policy.depart]]"), "{reason}");
        let output = agent.command(&["migrate", "viewer", "vms2"]).output();
        let said = String::from_utf8(output.unwrap().stderr).unwrap();
        assert!(said.contains("[[policy.depart]]"), "{said}");
        assert!(agent.log().contains("No domain may leave or come"));
    });
}

#[test]
fn vm_is_not_moved_on_its_own_request_where_only_an_operator_may_ask() {
    with_vm(&rule(""), |agent, vm| {
        assert_eq!(vm.destinations(), Vec::<String>::new());
        let reason = vm.refusal(2);
        assert!(reason.contains("by \"vm\""), "{reason}");
        let mut destination = agent.peer("vms2");
        let mut operator = agent
            .command(&["migrate", "viewer", "vms2"])
            .spawn()
            .unwrap();
        accept(&mut destination);
        // libvirt's `test` driver cannot migrate.
        assert!(!operator.wait().unwrap().success());
    });
}

#[test]
fn vm_that_was_moved_just_now_is_not_moved_again_on_its_own_request() {
    with_vm(&rule("by = [\"vm\"]"), |agent, vm| {
        assert_eq!(vm.destinations(), ["vms2"]);
        let mut destination = agent.peer("vms2");
        std::thread::scope(|scope| {
            scope.spawn(|| accept(&mut destination));
            vm.until(2, request(), |message| match message {
                VmMessage::MigrationResponse(_) => Some(()),
                _ => None,
            });
        });
        let reason = vm.until(2, MigrationReady::default(), |message| match message {
            VmMessage::MigrationAbort(abort) => Some(abort.0.text),
            _ => None,
        });
        assert!(reason.contains("stays on vms1"), "{reason}");
        let reason = vm.refusal(3);
        assert!(reason.contains("moved just now"), "{reason}");
    });
}
