//! `roamcast pki revoke`: certificate revocation lists of the CAs (RFC 5280 §5).

use std::fs;
use std::path::{Path, PathBuf};

use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevokedCertParams, SerialNumber};
use rustls_pki_types::pem::PemObject as _;
use rustls_pki_types::{CertificateDer, CertificateRevocationListDer};
use time::OffsetDateTime;
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};

use super::sign::{create_directory, io_error};
use super::{Authorities, CA_DAYS, Ca, Issued, PkiError, is_name, refuse_one_ca};
use crate::role::Role;

/// Result of a revocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Revoked {
    /// Written lists: of the CA of the signalling, and for a host with an agent also of libvirt's
    /// and QEMU's CA.
    pub lists: Vec<PathBuf>,
    /// New place of the revoked certificates.
    pub kept: PathBuf,
}

impl Revoked {
    /// Returns the next steps, for a person.
    pub fn next_steps(&self) -> String {
        let places = [
            "/etc/pki/roamcast/crl.pem",
            "/etc/pki/CA/crl.pem",
            "/etc/pki/qemu/ca-crl.pem",
        ];
        let copies = self.lists.iter().zip(places);
        let copies: String = copies
            .map(|(list, place)| format!("  scp {} root@HOST:{place}\n", list.display()))
            .collect();
        format!(
            "Certificates are kept in {}\n\nNext, for each host, relay and server (the first), and each host with an agent (all):\n{copies}\n\
             Roamcast sees its list by itself and ends connections. libvirt has to be told of its own: `crl_file` in\n\
             libvirtd.conf, and a restart of libvirtd.\n",
            self.kept.display()
        )
    }
}

/// Revokes all certificates of a name.
///
/// # Errors
///
/// [`PkiError::NotIssued`], [`PkiError::OneCa`], [`PkiError::Io`], [`PkiError::Ca`] if a CA cannot
/// sign.
pub fn revoke(directory: &Path, name: &str) -> Result<Revoked, PkiError> {
    refuse_one_ca(directory)?;
    let name = name.to_ascii_lowercase();
    let not_issued = || PkiError::NotIssued {
        directory: directory.to_owned(),
        name: name.clone(),
    };
    if !is_name(&name) {
        return Err(not_issued());
    }
    let host = directory.join(&name);
    let authorities = Authorities::of(directory);
    let issued = Issued::at(host.clone(), Role::Agent);
    let certificates = [
        (&authorities.signalling, Some(&issued.signalling)),
        (&authorities.libvirt, issued.libvirt.as_ref()),
        (&authorities.qemu, issued.qemu.as_ref()),
    ];
    let (mut lists, mut first) = (Vec::new(), None);
    for (ca, certificate) in certificates {
        let path = certificate.map(|files| &files.certificate);
        let Some(path) = path.filter(|path| path.exists()) else {
            continue;
        };
        let serial = serial(path).ok_or_else(not_issued)?;
        lists.push(ca.revoke(serial.clone())?);
        first.get_or_insert(serial);
    }
    let serial = first.ok_or_else(not_issued)?;
    let places = directory.join("revoked");
    create_directory(&places, 0o700)?;
    let kept = places.join(format!("{name}-{}", serial.to_string().replace(':', "")));
    fs::rename(&host, &kept).map_err(io_error("move", &host))?;
    Ok(Revoked { lists, kept })
}

fn serial(certificate: &Path) -> Option<SerialNumber> {
    let certificate = CertificateDer::from_pem_file(certificate).ok()?;
    let (_, parsed) = X509Certificate::from_der(&certificate).ok()?;
    Some(SerialNumber::from_slice(parsed.raw_serial()))
}

impl Ca {
    /// Adds a certificate to the CA's list. Returns the path of the list.
    fn revoke(&self, serial: SerialNumber) -> Result<PathBuf, PkiError> {
        let path = self.certificate.with_file_name("crl.pem");
        let (mut revoked, number) = listed(&path);
        let now = OffsetDateTime::now_utc();
        if !revoked.iter().any(|it| it.serial_number == serial) {
            revoked.push(RevokedCertParams {
                serial_number: serial,
                revocation_time: now,
                reason_code: None,
                invalidity_date: None,
            });
        }
        let params = CertificateRevocationListParams {
            this_update: now,
            next_update: now.saturating_add(time::Duration::days(CA_DAYS.into())),
            crl_number: SerialNumber::from(number + 1),
            issuing_distribution_point: None,
            revoked_certs: revoked,
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let list = params
            .signed_by(&self.issuer()?)
            .and_then(|list| list.pem())
            .map_err(|error| self.failed(error))?;
        // The rename is atomic: a reader sees the old list or the new one.
        let fresh = path.with_file_name(".crl.pem");
        fs::write(&fresh, list).map_err(io_error("write", &fresh))?;
        fs::rename(&fresh, &path).map_err(io_error("write", &path))?;
        Ok(path)
    }
}

/// Returns the entries and the number of a list; nothing and 0 if there is no list.
fn listed(path: &Path) -> (Vec<RevokedCertParams>, u64) {
    let Ok(list) = CertificateRevocationListDer::from_pem_file(path) else {
        return (Vec::new(), 0);
    };
    let Ok((_, parsed)) = CertificateRevocationList::from_der(&list) else {
        return (Vec::new(), 0);
    };
    let revoked = parsed
        .iter_revoked_certificates()
        .map(|it| RevokedCertParams {
            serial_number: SerialNumber::from_slice(it.raw_serial()),
            revocation_time: it.revocation_date.to_datetime(),
            reason_code: None,
            invalidity_date: None,
        });
    let number = parsed.crl_number().and_then(|it| it.try_into().ok());
    (revoked.collect(), number.unwrap_or_default())
}
