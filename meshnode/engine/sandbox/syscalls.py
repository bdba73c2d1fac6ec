"""System calls by name, for the architectures that llama.cpp's servers run on under Linux.

Sources: arch/x86/entry/syscalls/syscall_64.tbl, include/uapi/asm-generic/unistd.h (arm64).
`tests/meshnode/engine/test_sandbox.py` holds them against the system's headers.
"""

from __future__ import annotations

import os

LAST_KNOWN = 462
"""mseal, Linux 6.10; numbers are common to all architectures from 424 on. What came later is
answered with ENOSYS: nobody has judged it."""

AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}  # uapi/linux/audit.h
X32_BIT = 0x40000000

# name, number on x86_64, number on arm64
_TABLE = """
execve 59 221  execveat 322 281  fork 57 -  vfork 58 -  clone 56 220  clone3 435 435
ptrace 101 117  process_vm_readv 310 270  process_vm_writev 311 271  kcmp 312 272
process_madvise 440 440  process_mrelease 448 448  perf_event_open 298 241  personality 135 92
kill 62 129  tkill 200 130  tgkill 234 131  rt_sigqueueinfo 129 138  rt_tgsigqueueinfo 297 240
pidfd_open 434 434  pidfd_getfd 438 438  pidfd_send_signal 424 424  prlimit64 302 261
setpriority 141 140  ioprio_set 251 30  migrate_pages 256 238  move_pages 279 239

socket 41 198  socketpair 53 199  connect 42 203  sendto 44 206
io_uring_setup 425 425  io_uring_enter 426 426  io_uring_register 427 427

shmget 29 194  shmat 30 196  shmctl 31 195  semget 64 190  semop 65 193  semctl 66 191
semtimedop 220 192  msgget 68 186  msgsnd 69 189  msgrcv 70 188  msgctl 71 187
mq_open 240 180  mq_unlink 241 181

chmod 90 -  fchmod 91 52  fchmodat 268 53  fchmodat2 452 452  truncate 76 45
chown 92 -  lchown 94 -  fchown 93 55  fchownat 260 54
setxattr 188 5  lsetxattr 189 6  fsetxattr 190 7
removexattr 197 14  lremovexattr 198 15  fremovexattr 199 16
utime 132 -  utimes 235 -  futimesat 261 -  utimensat 280 88  mknod 133 -  mknodat 259 33
name_to_handle_at 303 264  open_by_handle_at 304 265  fanotify_init 300 262
fcntl 72 25  ioctl 16 29

mount 165 40  umount2 166 39  pivot_root 155 41  chroot 161 51  setns 308 268  unshare 272 97
open_tree 428 428  move_mount 429 429  fsopen 430 430  fsconfig 431 431  fsmount 432 432
fspick 433 433  mount_setattr 442 442  swapon 167 224  swapoff 168 225  acct 163 89
quotactl 179 60  quotactl_fd 443 443  reboot 169 142  kexec_load 246 104  kexec_file_load 320 294
init_module 175 105  finit_module 313 273  delete_module 176 106  bpf 321 280
userfaultfd 323 282  keyctl 250 219  add_key 248 217  request_key 249 218
settimeofday 164 170  clock_settime 227 112  clock_adjtime 305 266  adjtimex 159 171
iopl 172 -  ioperm 173 -  modify_ldt 154 -  syslog 103 116  sethostname 170 161
setdomainname 171 162  vhangup 153 58  lookup_dcookie 212 18  nfsservctl 180 42

setuid 105 146  setgid 106 144  setreuid 113 145  setregid 114 143  setresuid 117 147
setresgid 119 149  setfsuid 122 151  setfsgid 123 152  setgroups 116 159  capset 126 91

seccomp 317 277  landlock_create_ruleset 444 444  landlock_add_rule 445 445
landlock_restrict_self 446 446
"""


def machine() -> str:
    """The architecture whose system calls this process makes, as `uname` names it."""
    return os.uname().machine


def numbers(architecture: str) -> dict[str, int]:
    """Name to number; empty for an architecture that is not in the table. A call that the
    architecture never had is left out."""
    if architecture not in AUDIT_ARCH:
        return {}
    column = 1 + tuple(AUDIT_ARCH).index(architecture)
    words = _TABLE.split()
    rows = (words[at : at + 3] for at in range(0, len(words), 3))
    return {row[0]: int(row[column]) for row in rows if row[column] != "-"}
