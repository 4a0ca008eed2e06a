mod clock;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

use rustls::RootCertStore;
use rustls::crypto::ring;
use rustls::server::WebPkiClientVerifier;
use rustls_pki_types::UnixTime;

use super::*;
use crate::net::tls::{Ended, Tls, TlsError, TlsFiles, certificate_names};
use crate::role::RoleError;
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

fn request(name: &str) -> IssueRequest {
    IssueRequest {
        name: name.to_owned(),
        role: Role::Agent,
        addresses: vec!["2001:db8::2".parse().unwrap()],
        validity: Validity::days(1),
    }
}

fn files(issued: &Issued) -> TlsFiles {
    TlsFiles::from(&issued.signalling)
}

fn certificate(issued: &Certificate) -> CertificateDer<'static> {
    CertificateDer::from_pem_file(&issued.certificate).unwrap()
}

/// Returns true if the certificate verifies under the CA for client use, as libvirt requires.
fn verifies(issued: &Certificate, ca: &Path) -> bool {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_file(ca).unwrap();
    roots.add(ca).unwrap();
    WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::new(ring::default_provider()))
        .build()
        .unwrap()
        .verify_client_cert(&certificate(issued), &[], UnixTime::now())
        .is_ok()
}

fn mode(path: &Path) -> u32 {
    path.metadata().unwrap().permissions().mode() & 0o777
}

#[test]
fn issued_certificate_is_what_tls_accepts() {
    let directory = tempfile::tempdir().unwrap();
    let ca = init(directory.path(), "CA", Validity::days(1)).unwrap();
    let issued = issue(directory.path(), &request("VMS1.example")).unwrap();
    Tls::load(&files(&issued), "vms1.example", Role::Agent).unwrap();
    let certificate = certificate(&issued.signalling);
    assert_eq!(certificate_names(&certificate), ["vms1.example"]);
    assert_eq!(Role::of_certificate(&certificate), Ok(Role::Agent));
    assert!(ca.next_steps().contains("pki issue"));
    assert!(issued.next_steps().contains("root@vms1.example"));
}

#[test]
fn keys_are_readable_by_their_owner_only() {
    let directory = tempfile::tempdir().unwrap();
    let ca = init(directory.path(), "CA", Validity::days(1)).unwrap();
    let issued = issue(directory.path(), &request("vms1")).unwrap();
    let libvirt = issued.libvirt.unwrap();
    let qemu = issued.qemu.unwrap();
    for key in [qemu.key.with_file_name("client-key.pem"), qemu.key] {
        assert_eq!(mode(&key), 0o600, "{key:?}");
    }
    for key in [
        ca.signalling.key,
        ca.libvirt.key,
        ca.qemu.key,
        issued.signalling.key,
        libvirt.key.with_file_name("clientkey.pem"),
        libvirt.key,
    ] {
        assert_eq!(mode(&key), 0o600, "{key:?}");
        assert_eq!(mode(key.parent().unwrap()), 0o700, "{key:?}");
    }
}

#[test]
fn nothing_is_overwritten() {
    let directory = tempfile::tempdir().unwrap();
    init(directory.path(), "CA", Validity::days(1)).unwrap();
    let again = init(directory.path(), "CA", Validity::days(1));
    assert!(matches!(again, Err(PkiError::Exists { .. })));
    issue(directory.path(), &request("vms1")).unwrap();
    let again = issue(directory.path(), &request("vms1"));
    assert!(matches!(again, Err(PkiError::Exists { .. })));
}

#[test]
fn names_that_are_no_dns_names_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    init(directory.path(), "CA", Validity::days(1)).unwrap();
    for name in ["", "..", "../escape", "a/b", "*.example", "a b", "-"] {
        let result = issue(directory.path(), &request(name));
        assert!(
            matches!(result, Err(PkiError::InvalidName { .. })),
            "{name}: {result:?}"
        );
    }
}

#[test]
fn directory_without_ca_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let error = issue(directory.path(), &request("vms1")).unwrap_err();
    assert!(error.to_string().contains("cacert.pem"), "{error}");
}

#[test]
fn tls_tells_missing_expired_foreign_misnamed_and_mismatched_files_apart() {
    let directories = [(); 2].map(|()| tempfile::tempdir().unwrap());
    for directory in &directories {
        init(directory.path(), "CA", Validity::days(1)).unwrap();
    }
    let [own, other] = &directories;
    let good = files(&issue(own.path(), &request("vms1")).unwrap());
    let foreign = files(&issue(other.path(), &request("vms1")).unwrap());
    let now = OffsetDateTime::now_utc();
    let expired = issue(
        own.path(),
        &IssueRequest {
            validity: Validity {
                not_before: now.saturating_sub(time::Duration::days(2)),
                not_after: now.saturating_sub(time::Duration::days(1)),
            },
            ..request("old")
        },
    )
    .unwrap();

    let missing = TlsFiles {
        certificate: own.path().join("nowhere.pem"),
        ..good.clone()
    };
    assert!(matches!(
        Tls::load(&missing, "vms1", Role::Agent),
        Err(TlsError::Read { .. })
    ));
    let empty = TlsFiles {
        ca: good.key.clone(),
        ..good.clone()
    };
    assert!(matches!(
        Tls::load(&empty, "vms1", Role::Agent),
        Err(TlsError::Empty { .. })
    ));
    assert!(matches!(
        Tls::load(&files(&expired), "old", Role::Agent),
        Err(TlsError::Expired { .. })
    ));
    let wrong_ca = TlsFiles {
        ca: foreign.ca.clone(),
        ..good.clone()
    };
    assert!(matches!(
        Tls::load(&wrong_ca, "vms1", Role::Agent),
        Err(TlsError::WrongCa { .. })
    ));
    assert!(matches!(
        Tls::load(&good, "vms2", Role::Agent),
        Err(TlsError::WrongName { .. })
    ));
    let wrong_key = TlsFiles {
        key: foreign.key.clone(),
        ..good.clone()
    };
    assert!(matches!(
        Tls::load(&wrong_key, "vms1", Role::Agent),
        Err(TlsError::WrongKey { .. })
    ));
    assert!(matches!(
        Tls::load(&good, "no name", Role::Agent),
        Err(TlsError::InvalidName { .. })
    ));
}

#[test]
fn relays_and_servers_get_nothing_that_libvirt_or_qemu_knows() {
    let directory = tempfile::tempdir().unwrap();
    let authorities = init(directory.path(), "CA", Validity::days(1)).unwrap();
    let issue = |name, role| {
        let request = IssueRequest {
            role,
            ..request(name)
        };
        issue(directory.path(), &request).unwrap()
    };
    for (name, role) in [("relay1", Role::Relay), ("mcs1", Role::Mcs)] {
        let issued = issue(name, role);
        assert_eq!(
            Role::of_certificate(&certificate(&issued.signalling)),
            Ok(role)
        );
        assert!(verifies(
            &issued.signalling,
            &authorities.signalling.certificate
        ));
        assert!(!verifies(
            &issued.signalling,
            &authorities.libvirt.certificate
        ));
        assert_eq!((&issued.libvirt, &issued.qemu), (&None, &None));
        let inside: Vec<_> = issued.directory.read_dir().unwrap().collect();
        assert_eq!(inside.len(), 1, "{inside:?}");
        assert!(!issued.next_steps().contains("libvirt"));
    }
    let host = issue("vms1", Role::Agent);
    let libvirt = host.libvirt.unwrap();
    assert!(verifies(&libvirt, &authorities.libvirt.certificate));
    assert!(!verifies(&libvirt, &authorities.signalling.certificate));
    assert!(!verifies(
        &host.signalling,
        &authorities.libvirt.certificate
    ));
    assert_eq!(
        Role::of_certificate(&certificate(&libvirt)),
        Err(RoleError::Missing)
    );
}

#[test]
fn key_that_qemu_reads_opens_nothing_but_the_copy() {
    let directory = tempfile::tempdir().unwrap();
    let authorities = init(directory.path(), "CA", Validity::days(1)).unwrap();
    let host = issue(directory.path(), &request("vms1")).unwrap();
    let qemu = host.qemu.unwrap();
    let client = Certificate {
        certificate: qemu.certificate.with_file_name("client-cert.pem"),
        ..qemu.clone()
    };
    for certificate in [&qemu, &client] {
        assert!(verifies(certificate, &authorities.qemu.certificate));
        assert!(!verifies(certificate, &authorities.libvirt.certificate));
        assert!(!verifies(certificate, &authorities.signalling.certificate));
    }
    let libvirt = host.libvirt.unwrap();
    assert!(!verifies(&libvirt, &authorities.qemu.certificate));
}

#[test]
fn directory_of_a_version_without_a_ca_of_qemu_gets_that_and_keeps_the_others() {
    let directory = tempfile::tempdir().unwrap();
    let before = init(directory.path(), "CA", Validity::days(1)).unwrap();
    fs::remove_dir_all(directory.path().join("qemu")).unwrap();
    let error = issue(directory.path(), &request("vms1")).unwrap_err();
    assert!(matches!(error, PkiError::NoCopyCa { .. }), "{error}");
    assert!(error.to_string().contains("pki init"), "{error}");
    let read = |ca: &Ca| fs::read(&ca.certificate).unwrap();
    let kept = [&before.signalling, &before.libvirt].map(read);
    let after = init(directory.path(), "CA", Validity::days(1)).unwrap();
    assert_eq!([&after.signalling, &after.libvirt].map(read), kept);
    issue(directory.path(), &request("vms1")).unwrap();
}

#[test]
fn certificate_of_another_role_or_of_none_is_not_taken_and_the_command_is_named() {
    let directory = tempfile::tempdir().unwrap();
    init(directory.path(), "CA", Validity::days(1)).unwrap();
    let issued = issue(directory.path(), &request("vms1")).unwrap();
    let error = Tls::load(&files(&issued), "vms1", Role::Relay).unwrap_err();
    assert!(matches!(error, TlsError::WrongRole { .. }), "{error}");
    let said = error.to_string();
    assert!(
        said.contains("pki issue DIRECTORY vms1 --role relay"),
        "{said}"
    );
    let libvirts = TlsFiles::from(&issued.libvirt.unwrap());
    let error = Tls::load(&libvirts, "vms1", Role::Agent).unwrap_err();
    assert!(matches!(error, TlsError::NoRole { .. }), "{error}");
    let said = error.to_string();
    assert!(
        said.contains("pki issue DIRECTORY vms1 --role agent"),
        "{said}"
    );
}

#[test]
fn directory_of_the_version_before_is_named() {
    let directory = tempfile::tempdir().unwrap();
    let private = directory.path().join("private");
    fs::create_dir(&private).unwrap();
    fs::write(private.join("cakey.pem"), "key").unwrap();
    let errors = [
        init(directory.path(), "CA", Validity::days(1)).unwrap_err(),
        issue(directory.path(), &request("vms1")).unwrap_err(),
    ];
    for error in errors {
        assert!(matches!(error, PkiError::OneCa { .. }), "{error}");
        assert!(error.to_string().contains("pki init"), "{error}");
    }
}

#[test]
fn renewed_certificates_are_for_the_same_and_have_other_keys() {
    let directory = tempfile::tempdir().unwrap();
    init(directory.path(), "CA", Validity::days(1)).unwrap();
    for (name, role) in [("vms1", Role::Agent), ("relay1", Role::Relay)] {
        let request = IssueRequest {
            role,
            ..request(name)
        };
        let issued = issue(directory.path(), &request).unwrap();
        let before = certificate(&issued.signalling);
        let key = fs::read(&issued.signalling.key).unwrap();
        let renewed = renew(directory.path(), &name.to_uppercase(), Validity::days(9)).unwrap();
        assert_eq!(renewed, issued);
        let after = certificate(&renewed.signalling);
        assert_ne!(after, before);
        assert_ne!(fs::read(&renewed.signalling.key).unwrap(), key);
        assert_eq!(certificate_names(&after), [name]);
        let tls = Tls::load(&files(&renewed), name, role).unwrap();
        assert!(tls.days_left(OffsetDateTime::now_utc()) >= Some(8));
        if let Some(libvirt) = &renewed.libvirt {
            let found = String::from_utf8_lossy(&certificate(libvirt)).into_owned();
            assert!(found.contains(name), "the same host");
        }
    }
    let left: Vec<_> = directory.path().read_dir().unwrap().flatten().collect();
    let hidden = |it: &fs::DirEntry| it.file_name().to_string_lossy().starts_with('.');
    assert!(!left.iter().any(hidden), "{left:?}");
}

#[test]
fn name_without_a_certificate_is_neither_renewed_nor_revoked() {
    let directory = tempfile::tempdir().unwrap();
    init(directory.path(), "CA", Validity::days(1)).unwrap();
    for name in ["vms9", "", "..", "../signalling", "signalling"] {
        let errors = [
            renew(directory.path(), name, Validity::days(1)).unwrap_err(),
            revoke(directory.path(), name).unwrap_err(),
        ];
        for error in errors {
            assert!(
                matches!(error, PkiError::NotIssued { .. }),
                "{name}: {error}"
            );
        }
    }
}

#[test]
fn revoked_certificate_is_refused_and_its_name_can_be_issued_anew() {
    let directory = tempfile::tempdir().unwrap();
    let authorities = init(directory.path(), "CA", Validity::days(1)).unwrap();
    let mut stolen = Vec::new();
    for name in ["vms1", "vms2"] {
        let issued = issue(directory.path(), &request(name)).unwrap();
        stolen.push(certificate(&issued.signalling));
        let revoked = revoke(directory.path(), name).unwrap();
        assert_eq!(revoked.lists.len(), 3);
        assert!(revoked.kept.join("roamcast/cert.pem").exists());
        assert!(!issued.directory.exists());
    }
    let fresh = issue(directory.path(), &request("vms1")).unwrap();
    let list = authorities.signalling.certificate.with_file_name("crl.pem");
    let files = TlsFiles {
        crl: list,
        ..files(&fresh)
    };
    let tls = Tls::load(&files, "vms1", Role::Agent).unwrap();
    for stolen in &stolen {
        assert_eq!(
            tls.ended(std::slice::from_ref(stolen)),
            Some(Ended::Revoked)
        );
    }
    assert_eq!(tls.ended(&[certificate(&fresh.signalling)]), None);
}

#[test]
fn list_of_revoked_certificates_is_used_or_named() {
    let directory = tempfile::tempdir().unwrap();
    init(directory.path(), "CA", Validity::days(1)).unwrap();
    let issued = issue(directory.path(), &request("vms1")).unwrap();
    let files = files(&issued);
    issue(directory.path(), &request("vms2")).unwrap();
    let tls = Tls::load(&files, "vms1", Role::Agent).unwrap();
    assert!(tls.reload().is_ok(), "there is none, and need not be");
    for broken in [
        "",
        "-----BEGIN X509 CRL-----\nAAAA\n-----END X509 CRL-----\n",
    ] {
        fs::write(&files.crl, broken).unwrap();
        let error = Tls::load(&files, "vms1", Role::Agent).unwrap_err();
        assert!(matches!(error, TlsError::Crl { .. }), "{error}");
        assert!(error.to_string().contains("crl.pem"), "{error}");
    }
    let revoked = revoke(directory.path(), "vms2").unwrap();
    fs::copy(&revoked.lists[0], &files.crl).unwrap();
    let tls = Tls::load(&files, "vms1", Role::Agent).unwrap();
    fs::remove_file(&files.crl).unwrap();
    assert!(
        matches!(tls.reload(), Err(TlsError::Crl { .. })),
        "it was there"
    );

    // The host's own certificate.
    let revoked = revoke(directory.path(), "vms1").unwrap();
    let kept = revoked.kept.join("roamcast");
    let files = TlsFiles {
        ca: kept.join("cacert.pem"),
        certificate: kept.join("cert.pem"),
        key: kept.join("private/key.pem"),
        crl: revoked.lists[0].clone(),
    };
    let error = Tls::load(&files, "vms1", Role::Agent).unwrap_err();
    assert!(matches!(error, TlsError::Revoked { .. }), "{error}");
}
