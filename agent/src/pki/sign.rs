//! Signs certificates and writes their files.

use std::fs::{self, DirBuilder, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, SanType,
};

use super::{Ca, Certificate, PkiError, Validity};

/// A signed certificate in PEM, not written yet.
pub(super) struct Signed {
    ca: String,
    certificate: String,
    key: String,
}

impl Signed {
    pub(super) fn write(&self, to: &Certificate) -> Result<(), PkiError> {
        for (path, mode) in [(&to.ca, 0o755), (&to.certificate, 0o755), (&to.key, 0o700)] {
            create_directory(path.parent().unwrap_or(path), mode)?;
        }
        write_new(&to.ca, &self.ca, 0o644)?;
        self.write_pair(&to.certificate, &to.key)
    }

    /// Writes a copy to the paths of libvirt's client.
    pub(super) fn write_for_libvirt(&self, to: &Certificate) -> Result<(), PkiError> {
        self.write(to)?;
        self.write_pair(
            &to.certificate.with_file_name("clientcert.pem"),
            &to.key.with_file_name("clientkey.pem"),
        )
    }

    /// Writes the files for QEMU: one directory (`tls-creds-x509`), whose keys QEMU reads as the
    /// user that runs VMs.
    pub(super) fn write_for_qemu(&self, to: &Certificate) -> Result<(), PkiError> {
        create_directory(to.key.parent().unwrap_or(&to.key), 0o755)?;
        write_new(&to.ca, &self.ca, 0o644)?;
        self.write_pair(&to.certificate, &to.key)?;
        self.write_pair(
            &to.certificate.with_file_name("client-cert.pem"),
            &to.key.with_file_name("client-key.pem"),
        )
    }

    fn write_pair(&self, certificate: &Path, key: &Path) -> Result<(), PkiError> {
        write_new(certificate, &self.certificate, 0o644)?;
        write_new(key, &self.key, 0o600)
    }
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

    /// Reads certificate and key of the CA, for signing.
    pub(super) fn issuer(&self) -> Result<Issuer<'static, KeyPair>, PkiError> {
        let failed = |error| self.failed(error);
        let ca = read(&self.certificate)?;
        let key = KeyPair::from_pem(&read(&self.key)?).map_err(failed)?;
        Issuer::from_ca_cert_pem(&ca, key).map_err(failed)
    }

    pub(super) fn sign(
        &self,
        name: &str,
        names: Vec<SanType>,
        validity: Validity,
    ) -> Result<Signed, PkiError> {
        let failed = |error| self.failed(error);
        let ca = read(&self.certificate)?;
        let issuer = self.issuer()?;
        let key = KeyPair::generate().map_err(failed)?;
        let mut params = CertificateParams::default();
        params.not_before = validity.not_before;
        params.not_after = validity.not_after;
        params.distinguished_name = common_name(name);
        params.subject_alt_names = names;
        // libvirt warns about a certificate without key encipherment, although ECDSA does not use
        // it.
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
    fs::read_to_string(path).map_err(io_error("read", path))
}

/// Returns a function that adds an action and a path to a system error.
pub(super) fn io_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> PkiError {
    let path = path.to_owned();
    move |error| PkiError::Io {
        action,
        path: path.clone(),
        error,
    }
}

pub(super) fn create_directory(path: &Path, mode: u32) -> Result<(), PkiError> {
    DirBuilder::new()
        .recursive(true)
        .mode(0o755)
        .create(path.parent().unwrap_or(path))
        .and_then(|()| DirBuilder::new().recursive(true).mode(mode).create(path))
        .map_err(io_error("create", path))
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
