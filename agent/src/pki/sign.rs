//! Signing, and the files of what is signed.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

use super::{Ca, Certificate, PkiError, Validity};

/// A certificate that is not written yet, in PEM.
pub(super) struct Signed {
    ca: String,
    certificate: String,
    key: String,
}

impl Signed {
    pub(super) fn write(&self, to: Certificate) -> Result<Certificate, PkiError> {
        for (path, mode) in [(&to.ca, 0o755), (&to.certificate, 0o755), (&to.key, 0o700)] {
            create_directory(path.parent().unwrap_or(path), mode)?;
        }
        write_new(&to.ca, &self.ca, 0o644)?;
        write_new(&to.certificate, &self.certificate, 0o644)?;
        write_new(&to.key, &self.key, 0o600)?;
        Ok(to)
    }
}

pub(super) fn write_for_libvirt(signed: &Signed, host: &Path) -> Result<Certificate, PkiError> {
    let libvirt = host.join("libvirt");
    let issued = signed.write(Certificate {
        ca: host.join("CA/cacert.pem"),
        certificate: libvirt.join("servercert.pem"),
        key: libvirt.join("private/serverkey.pem"),
    })?;
    write_new(&libvirt.join("clientcert.pem"), &signed.certificate, 0o644)?;
    write_new(&libvirt.join("private/clientkey.pem"), &signed.key, 0o600)?;
    Ok(issued)
}

/// QEMU looks for all in one directory (`tls-creds-x509`), whose keys it reads as the user that VMs run as.
pub(super) fn write_for_qemu(signed: &Signed, host: &Path) -> Result<Certificate, PkiError> {
    let qemu = host.join("qemu");
    create_directory(&qemu, 0o755)?;
    write_new(&qemu.join("client-cert.pem"), &signed.certificate, 0o644)?;
    write_new(&qemu.join("client-key.pem"), &signed.key, 0o600)?;
    let issued = Certificate {
        ca: qemu.join("ca-cert.pem"),
        certificate: qemu.join("server-cert.pem"),
        key: qemu.join("server-key.pem"),
    };
    write_new(&issued.ca, &signed.ca, 0o644)?;
    write_new(&issued.certificate, &signed.certificate, 0o644)?;
    write_new(&issued.key, &signed.key, 0o600)?;
    Ok(issued)
}

impl Ca {
    pub(super) fn failed(&self, error: rcgen::Error) -> PkiError {
        PkiError::Ca {
            directory: self.directory.clone(),
            error,
        }
    }

    pub(super) fn make(&self, name: &str, validity: Validity) -> Result<(), PkiError> {
        let key = KeyPair::generate().map_err(|error| self.failed(error))?;
        let mut params = CertificateParams::default();
        params.not_before = validity.not_before;
        params.not_after = validity.not_after;
        params.distinguished_name = common_name(name);
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate = params
            .self_signed(&key)
            .map_err(|error| self.failed(error))?;
        create_directory(&self.directory, 0o755)?;
        create_directory(&self.directory.join("private"), 0o700)?;
        write_new(&self.key, &key.serialize_pem(), 0o600)?;
        write_new(&self.certificate, &certificate.pem(), 0o644)
    }

    pub(super) fn sign(
        &self,
        name: &str,
        names: Vec<SanType>,
        validity: Validity,
    ) -> Result<Signed, PkiError> {
        let failed = |error| self.failed(error);
        let ca = read(&self.certificate)?;
        let ca_key = KeyPair::from_pem(&read(&self.key)?).map_err(failed)?;
        let issuer = Issuer::from_ca_cert_pem(&ca, ca_key).map_err(failed)?;
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.not_before = validity.not_before;
        params.not_after = validity.not_after;
        params.distinguished_name = common_name(name);
        params.subject_alt_names = names;
        // libvirt warns about a certificate without key encipherment, although ECDSA has no use of it.
        params.key_usages = vec![
            KeyUsagePurpose::DigitalSignature,
            KeyUsagePurpose::KeyEncipherment,
        ];
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        params.use_authority_key_identifier_extension = true;
        let certificate = params.signed_by(&key, &issuer).map_err(failed)?.pem();
        Ok(Signed {
            ca,
            certificate,
            key: key.serialize_pem(),
        })
    }
}

fn common_name(name: &str) -> DistinguishedName {
    let mut distinguished_name = DistinguishedName::new();
    distinguished_name.push(DnType::CommonName, name);
    distinguished_name
}

fn read(path: &Path) -> Result<String, PkiError> {
    fs::read_to_string(path).map_err(|error| PkiError::Io {
        action: "read",
        path: path.to_owned(),
        error,
    })
}

fn create_directory(path: &Path, mode: u32) -> Result<(), PkiError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path.parent().unwrap_or(path))
        .and_then(|()| DirBuilder::new().recursive(true).mode(mode).create(path))
        .map_err(|error| PkiError::Io {
            action: "create",
            path: path.to_owned(),
            error,
        })
}

fn write_new(path: &Path, content: &str, mode: u32) -> Result<(), PkiError> {
    OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(mode)
        .open(path)
        .and_then(|mut file| file.write_all(content.as_bytes()))
        .map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => PkiError::Exists {
                path: path.to_owned(),
            },
            _ => PkiError::Io {
                action: "write",
                path: path.to_owned(),
                error,
            },
        })
}
