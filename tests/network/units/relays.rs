//! The relay and the migration control server under the restrictions of their units.

use std::fs;
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use common::signal::{DirectoryMessage, KnownFlow, Register, Role as SignalRole};
use lab::binaries;
use lab::confine::DYNAMIC_USER;
use roamcast::pki::{self, Validity};
use roamcast::role::Role;
use serde_json::Value;
use support::agent::issue;
use support::liar::Liar;
use support::netns::Namespace;
use support::relay_net::{
    Client, DESTINATION_PORT, Net, Received, Relay, SOURCE, SOURCE_PORT, Sender, request,
};

use super::systemd::{Service, Systemd, give, load_credentials, possible, take_keys};

const GROUP: Ipv6Addr = Ipv6Addr::new(0xff0e, 0, 0, 0, 0, 0, 0x4321, 1);

fn credentials(directory: &Path, config: &Path) -> std::path::PathBuf {
    let [ca, cert, key] = take_keys(config, ["ca", "cert", "key"]);
    let files: [(&str, &Path); 3] = [("cacert.pem", &ca), ("cert.pem", &cert), ("key.pem", &key)];
    load_credentials(directory, &files)
}

#[test]
fn relay_relays_and_adopts_and_its_operator_is_root() {
    if !possible() {
        return;
    }
    let net = Net::new();
    net.relay.run_with_bpffs(|bpffs| {
        std::thread::scope(|scope| {
            let config = net.configure(bpffs, "");
            let (directory, pins) = (net.path(""), bpffs.join("relay"));
            let credentials = credentials(&directory, &config);
            give(&directory);
            give(&pins);
            let mut systemd = Systemd::new("roamcast-relay", &directory);
            let run = |systemd: &Systemd| {
                let mut command = systemd.command(&[&directory, &pins], "roamcast");
                command.args(["relay", "--config"]).arg(&config);
                command.env("CREDENTIALS_DIRECTORY", &credentials);
                Relay::run(&net, command)
            };
            let mut relay = run(&systemd);
            let client = Client::start(scope, &net, "vms1");
            client.connect();
            let mut asked = request(GROUP, &[]);
            asked.flows = vec![KnownFlow {
                source: SOURCE.octets().into(),
                source_port: SOURCE_PORT,
                destination_port: DESTINATION_PORT,
            }];
            client.send(1, asked);
            let flow = client.response(1).flows[0].clone();
            let received = Received::start(scope, &net, flow.relay_port, flow.agent_port);
            let sender = Sender::start(scope, &net, GROUP, SOURCE_PORT);
            received.more(200);
            assert!(net.is_joined(GROUP));
            systemd.wait();
            let shown = net.status();
            assert_eq!(shown["sessions"][0]["agent"], "vms1", "{shown}");
            assert_eq!(fs::metadata(&pins).unwrap().uid(), DYNAMIC_USER);

            relay.kill();
            let cleaner = || {
                let mut command = Command::new(binaries::path("roamcast").unwrap());
                command.args(["cleanup", "--pin-root"]).arg(&pins);
                command.output().unwrap()
            };
            let relay = run(&systemd);
            received.more(200);
            // The hook of the killed relay is unchanged, so the new relay finds it without the
            // right to inspect other programs.
            let shown = net.status();
            assert_eq!(shown["memberships"][0]["holder"], "kernel", "{shown}");
            let refused = cleaner();
            assert!(!refused.status.success(), "{refused:?}");
            drop(relay);
            let output = cleaner();
            assert!(output.status.success(), "{output:?}");
            assert!(
                !pins
                    .join(format!("v{}", common::maps::LAYOUT_VERSION))
                    .exists()
            );
            sender.stop();
            drop((client, received));
        });
    });
}

#[test]
fn migration_control_server_takes_a_registration() {
    if !possible() {
        return;
    }
    let namespace = Namespace::new("mcs");
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let pki = directory.join("pki");
    pki::init(&pki, "test CA", Validity::days(60)).unwrap();
    let own = issue(&pki, "mcs1", Role::Mcs);
    let (config, socket) = (directory.join("mcs.toml"), directory.join("mcs.sock"));
    let text = format!(
        "[mcs]\nname = \"mcs1\"\nlisten = \"[::1]:47411\"\ncontrol_socket = {socket:?}\n\
         [policy]\nrelays = [\"relay*\"]\n[tls]\nca = {:?}\ncert = {:?}\nkey = {:?}\n",
        own.ca, own.certificate, own.key
    );
    fs::write(&config, text).unwrap();
    let credentials = credentials(directory, &config);
    give(directory);
    namespace.run(|| {
        let mut systemd = Systemd::new("roamcast-mcs", directory);
        let mut command = systemd.command(&[directory], "roamcast");
        command.args(["mcs", "--config"]).arg(&config);
        command.env("CREDENTIALS_DIRECTORY", &credentials);
        let mut service = Service::start(command);
        let status = || {
            let mut command = Command::new(binaries::path("roamcast").unwrap());
            command.args(["status", "--json", "--socket"]).arg(&socket);
            serde_json::from_slice::<Value>(&command.output().unwrap().stdout).ok()
        };
        service.wait("the server", status);
        let files = issue(&pki, "relay1", Role::Relay);
        let to = SocketAddr::from((Ipv6Addr::LOCALHOST, 47411));
        let mut relay = Liar::connect(to, "mcs1", &files.ca, &files);
        let register = DirectoryMessage::from(Register {
            role: SignalRole::Relay,
            address: [1; 16].into(),
            site: String::new(),
            serves: Vec::new(),
        });
        relay.say_bytes(&register.encode(1));
        service.wait("the registration", || {
            (status()?["registrations"][0]["name"] == "relay1").then_some(())
        });
        systemd.wait();
    });
}
