//! Layers and root file systems on overlayfs.
