//! A user of the host makes the folder of the pins before the agent does, to have the kernel programs read
//! maps of his.

use std::fs::{self, DirBuilder, Permissions};
use std::os::unix::fs::{DirBuilderExt as _, PermissionsExt as _, chown, symlink};
use std::path::Path;

use roamcast::datapath::{Datapath, DatapathConfig, DatapathError};

use super::host::config;
use super::netns::{Namespace, privileged};

const NOBODY: u32 = 65_534;

#[test]
fn folders_of_others_are_not_used_for_pins() {
    if !privileged() {
        return;
    }
    let host = Namespace::new("host");
    host.run_with_bpffs(|bpffs: &Path| {
        let config = DatapathConfig {
            pin_root: bpffs.join("roamcast"),
            ..config(bpffs)
        };
        let root = &config.pin_root;
        let version = format!("v{}", common::maps::LAYOUT_VERSION);
        let others = |path: &Path| chown(path, Some(NOBODY), None).unwrap();
        let writable =
            |path: &Path| fs::set_permissions(path, Permissions::from_mode(0o777)).unwrap();
        let make = |path: &Path| {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(path)
                .unwrap();
        };
        let places = [
            root.clone(),
            root.join(&version),
            root.join(&version).join("links"),
        ];
        for place in &places {
            for spoil in [&others as &dyn Fn(&Path), &writable] {
                make(place);
                spoil(place);
                let refused = Datapath::load(&config).err();
                let Some(error @ DatapathError::PinsOfOthers { .. }) = refused else {
                    panic!("{}: {refused:?}", place.display());
                };
                let text = error.to_string();
                assert!(text.contains(&place.display().to_string()), "{text}");
                fs::remove_dir_all(root).unwrap();
            }
        }
        make(&bpffs.join("elsewhere"));
        symlink(bpffs.join("elsewhere"), root).unwrap();
        assert!(matches!(
            Datapath::load(&config).err(),
            Some(DatapathError::PinsOfOthers { .. })
        ));
        fs::remove_file(root).unwrap();
        Datapath::load(&config).unwrap();
        let mode = fs::metadata(root).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o700);
    });
}
