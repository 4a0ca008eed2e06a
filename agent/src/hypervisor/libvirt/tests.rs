//! Tests against libvirt's own `test` driver, which keeps made-up domains in this process.

use std::time::Duration;

use tokio::sync::mpsc::{UnboundedReceiver, unbounded_channel};
use virt::connect::Connect;
use virt::domain::Domain as VirtDomain;

use super::*;
use crate::proto::{Domain, DomainInterface};

const DEADLINE: Duration = Duration::from_secs(20);

/// Receiver of events, with a deadline for each wait.
struct Events(UnboundedReceiver<HypervisorEvent>);

impl Events {
    async fn until<T>(&mut self, mut wanted: impl FnMut(HypervisorEvent) -> Option<T>) -> T {
        let wait = async {
            loop {
                let event = self.0.recv().await.expect("libvirt's events ended");
                if let Some(found) = wanted(event) {
                    return found;
                }
            }
        };
        tokio::time::timeout(DEADLINE, wait)
            .await
            .expect("the event did not come")
    }

    /// Waits for the end of a domain's migration.
    async fn ended(&mut self, uuid: DomainUuid) -> Result<crate::proto::JobStats, String> {
        self.until(|event| match event {
            HypervisorEvent::MigrationEnded { uuid: of, result } => (of == uuid).then_some(result),
            _ => None,
        })
        .await
    }

    /// Waits for a domain to be reported as running or not.
    async fn domain(&mut self, name: &str, running: bool) -> Domain {
        self.until(|event| match event {
            HypervisorEvent::Domain(domain) if domain.name == name && domain.running == running => {
                Some(domain)
            }
            _ => None,
        })
        .await
    }
}

fn start(uri: &str) -> (Libvirt, Events) {
    let (sender, receiver) = unbounded_channel();
    let config = LibvirtConfig {
        uri: uri.to_owned(),
        ..LibvirtConfig::default()
    };
    let libvirt = Libvirt::start(config, sender).unwrap();
    (libvirt, Events(receiver))
}

fn create(connection: &Connect, name: &str) -> VirtDomain {
    let xml = format!(
        "<domain type='test'><name>{name}</name><memory>8192</memory><os><type>hvm</type></os>
         <devices><interface type='bridge'><mac address='52:54:00:01:02:03'/>
         <source bridge='br0'/><target dev='tap7'/></interface></devices></domain>"
    );
    connection.create_domain_xml(&xml, 0).unwrap()
}

fn uuid(domain: &VirtDomain) -> DomainUuid {
    DomainUuid(*domain.uuid().unwrap().as_bytes())
}

#[tokio::test]
async fn domains_are_listed_before_connected() {
    let (_libvirt, mut events) = start("test:///default");
    let mut listed = Vec::new();
    events
        .until(|event| match event {
            HypervisorEvent::Domain(domain) => {
                listed.push(domain.name);
                None
            }
            HypervisorEvent::Connected => Some(()),
            _ => None,
        })
        .await;
    assert!(listed.contains(&"test".to_owned()), "{listed:?}");
}

#[tokio::test]
async fn domain_is_followed_from_its_start_to_its_end() {
    let (_libvirt, mut events) = start("test:///default");
    events
        .until(|event| (event == HypervisorEvent::Connected).then_some(()))
        .await;
    let connection = Connect::open(Some("test:///default")).unwrap();
    let domain = create(&connection, "followed");
    let reported = events.domain("followed", true).await;
    assert_eq!(reported.uuid, uuid(&domain));
    assert_eq!(
        reported.interfaces,
        [DomainInterface {
            target_dev: "tap7".to_owned(),
            mac: [0x52, 0x54, 0, 1, 2, 3],
            vhost: false,
        }]
    );
    domain.suspend().unwrap();
    events.domain("followed", false).await;
    domain.resume().unwrap();
    // A resume without a migration is reported as such.
    events
        .until(|event| match event {
            HypervisorEvent::Suspended { uuid, .. } => {
                assert_ne!(
                    uuid, reported.uuid,
                    "paused by a person, not by a migration"
                );
                None
            }
            HypervisorEvent::Resumed { uuid, migrated, .. } => {
                (uuid == reported.uuid).then(|| assert!(!migrated))
            }
            _ => None,
        })
        .await;
    events.domain("followed", true).await;
    domain.destroy().unwrap();
    events
        .until(|event| (event == HypervisorEvent::Gone(reported.uuid)).then_some(()))
        .await;
}

#[tokio::test]
async fn libvirtd_that_is_away_is_reported_once_and_migrations_fail() {
    let (libvirt, mut events) = start("qemu+unix:///system?socket=/nonexistent/libvirt-sock");
    let reason = events
        .until(|event| match event {
            HypervisorEvent::Disconnected { reason } => Some(reason),
            _ => None,
        })
        .await;
    assert!(reason.contains("cannot be reached"), "{reason}");
    let uuid = DomainUuid([7; 16]);
    libvirt.migrate(MigrateRequest {
        uuid,
        connect_uri: "qemu+tls://[2001:db8::2]/system".to_owned(),
        migrate_uri: String::new(),
        tls: false,
    });
    libvirt.abort(uuid);
    let result = events
        .until(|event| match event {
            HypervisorEvent::Disconnected { .. } => panic!("reported again"),
            HypervisorEvent::MigrationEnded { uuid: of, result } => (of == uuid).then_some(result),
            _ => None,
        })
        .await;
    assert!(result.unwrap_err().contains("is not connected"));
}

#[tokio::test]
async fn migration_of_unknown_domain_ends_with_its_uuid() {
    let (libvirt, mut events) = start("test:///default");
    events
        .until(|event| (event == HypervisorEvent::Connected).then_some(()))
        .await;
    let uuid = DomainUuid([8; 16]);
    libvirt.migrate(MigrateRequest {
        uuid,
        connect_uri: "test:///default".to_owned(),
        migrate_uri: String::new(),
        tls: false,
    });
    let result = events
        .until(|event| match event {
            HypervisorEvent::MigrationEnded { uuid: of, result } => (of == uuid).then_some(result),
            _ => None,
        })
        .await;
    assert!(result.unwrap_err().contains(&uuid.to_string()));
}

#[tokio::test]
async fn migration_that_libvirt_refuses_says_why() {
    let (libvirt, mut events) = start("test:///default");
    events
        .until(|event| (event == HypervisorEvent::Connected).then_some(()))
        .await;
    let connection = Connect::open(Some("test:///default")).unwrap();
    let domain = create(&connection, "refused");
    libvirt.migrate(MigrateRequest {
        uuid: uuid(&domain),
        connect_uri: "test:///default".to_owned(),
        migrate_uri: "tcp://[::1]".to_owned(),
        tls: false,
    });
    let reason = events
        .until(|event| match event {
            HypervisorEvent::MigrationEnded { result, .. } => result.err(),
            _ => None,
        })
        .await;
    assert!(reason.contains("`refused`"), "{reason}");
    domain.destroy().unwrap();
}

#[tokio::test]
async fn migration_that_never_begins_is_followed_until_the_bound() {
    let (libvirt, mut events) = start("test:///default");
    events
        .until(|event| (event == HypervisorEvent::Connected).then_some(()))
        .await;
    let connection = Connect::open(Some("test:///default")).unwrap();
    let domain = create(&connection, "stays");
    let uuid = uuid(&domain);
    // Two announcements make one migration.
    for _ in 0..2 {
        follow::expect(&libvirt.shared, uuid, Duration::from_millis(300));
    }
    let result = events.ended(uuid).await;
    assert!(result.unwrap_err().contains("nobody has asked"));
    domain.destroy().unwrap();
    libvirt.follow(uuid);
    let result = events.ended(uuid).await;
    assert!(result.unwrap_err().contains("was shut down"));
}

#[tokio::test]
async fn migration_that_was_only_waited_for_does_not_stand_in_the_way() {
    let (libvirt, mut events) = start("test:///default");
    events
        .until(|event| (event == HypervisorEvent::Connected).then_some(()))
        .await;
    let connection = Connect::open(Some("test:///default")).unwrap();
    let domain = create(&connection, "awaited");
    let uuid = uuid(&domain);
    libvirt.follow(uuid);
    libvirt.migrate(MigrateRequest {
        uuid,
        connect_uri: "test:///default".to_owned(),
        migrate_uri: "tcp://[::1]".to_owned(),
        tls: false,
    });
    let result = events.ended(uuid).await;
    assert!(result.unwrap_err().contains("`awaited`"));
    assert!(lock(&libvirt.shared.migrations).is_empty());
    domain.destroy().unwrap();
}

#[tokio::test]
async fn agent_leaves_its_name_with_a_running_domain_in_place_of_another() {
    let (sender, receiver) = unbounded_channel();
    let name = crate::value::Name::try_from("vms1".to_owned()).unwrap();
    let config = LibvirtConfig {
        uri: "test:///default".to_owned(),
        metadata: Some(name.clone()),
        ..LibvirtConfig::default()
    };
    let _libvirt = Libvirt::start(config, sender).unwrap();
    let mut events = Events(receiver);
    events
        .until(|event| (event == HypervisorEvent::Connected).then_some(()))
        .await;
    let connection = Connect::open(Some("test:///default")).unwrap();
    let xml = "<domain type='test'><name>named</name><memory>8192</memory><os><type>hvm</type></os>
        <metadata><r:agent xmlns:r='urn:roamcast:agent:1' name='vms2'/></metadata></domain>";
    let domain = connection.create_domain_xml(xml, 0).unwrap();
    let named = || {
        let xml = domain.xml_desc(0).unwrap();
        crate::hypervisor::metadata::agent(&xml).unwrap() == Some(name.clone())
    };
    let deadline = std::time::Instant::now() + DEADLINE;
    while !named() {
        assert!(std::time::Instant::now() < deadline, "no name was left");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    domain.destroy().unwrap();
}
