// What an attacker who has taken over a process would try: `probe ACTION TARGET`.
// It prints "ok" and what it got, or "refused" and the error's number.
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/un.h>
#include <sys/wait.h>
#include <unistd.h>

static const char * target;

static int opened(int flags) {
    const int fd = open(target, flags, 0600);
    if (fd >= 0) {
        close(fd);
    }
    return fd;
}

static int act_read(void)  { return opened(O_RDONLY); }
static int act_write(void) { return opened(O_WRONLY); }
static int act_make(void)  { return opened(O_WRONLY | O_CREAT | O_EXCL); }
static int act_cut(void)   { return opened(O_RDONLY | O_TRUNC); }
static int act_truncate(void) { return truncate(target, 1); }
static int act_chmod(void) { return chmod(target, 0666); }
static int act_remove(void) { return unlink(target); }
static int act_list(void) {
    DIR * folder = opendir(target);
    return folder == NULL ? -1 : closedir(folder);
}

// 127.0.0.1:PORT or ::1:PORT
static int internet(int type, int connects) {
    struct sockaddr_in  v4 = { .sin_family = AF_INET };
    struct sockaddr_in6 v6 = { .sin6_family = AF_INET6, .sin6_addr = IN6ADDR_LOOPBACK_INIT };
    v4.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
    const in_port_t port = htons((unsigned short) atoi(strrchr(target, ':') + 1));
    v4.sin_port = v6.sin6_port = port;
    const int is_v6 = target[0] == ':';
    const struct sockaddr * address = is_v6 ? (struct sockaddr *) &v6 : (struct sockaddr *) &v4;
    const socklen_t size = is_v6 ? sizeof(v6) : sizeof(v4);
    const int fd = socket(is_v6 ? AF_INET6 : AF_INET, type, 0);
    if (fd < 0) {
        return -1;
    }
    return connects ? connect(fd, address, size) : (int) sendto(fd, "x", 1, 0, address, size);
}

static int act_tcp(void) { return internet(SOCK_STREAM, 1); }
static int act_udp(void) { return internet(SOCK_DGRAM, 0); }
static int act_netlink(void) { return socket(AF_NETLINK, SOCK_RAW, 0); }

// A path, or @NAME for an abstract socket.
static socklen_t unix_address(struct sockaddr_un * address) {
    memset(address, 0, sizeof(*address));
    address->sun_family = AF_UNIX;
    strncpy(address->sun_path, target, sizeof(address->sun_path) - 1);
    const socklen_t size = (socklen_t) (offsetof(struct sockaddr_un, sun_path) + strlen(target));
    if (target[0] == '@') {
        address->sun_path[0] = '\0';
        return size;
    }
    return size + 1;
}

static int act_connect(void) {
    struct sockaddr_un address;
    const socklen_t size = unix_address(&address);
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return fd < 0 ? -1 : connect(fd, (struct sockaddr *) &address, size);
}
static int act_datagram(void) {
    struct sockaddr_un address;
    const socklen_t size = unix_address(&address);
    int pair[2];
    if (socketpair(AF_UNIX, SOCK_DGRAM, 0, pair) != 0) {
        return -1;
    }
    const int fd = socket(AF_UNIX, SOCK_DGRAM, 0);
    return fd < 0 ? -1 : (int) sendto(fd, "x", 1, 0, (struct sockaddr *) &address, size);
}
static int act_listen(void) {
    struct sockaddr_un address;
    const socklen_t size = unix_address(&address);
    const int fd = socket(AF_UNIX, SOCK_STREAM, 0);
    return fd < 0 || bind(fd, (struct sockaddr *) &address, size) != 0 ? -1 : listen(fd, 1);
}

static int act_exec(void) {
    char * const argv[] = { "sh", "-c", "echo ok 0", NULL };
    return execv(target, argv);
}
static int act_exec_guess(void) { // with what stood in the launcher's registers, as far as we know
    char * const argv[] = { "sh", "-c", "echo ok 0", NULL };
    char * const none[] = { NULL };
    return (int) syscall(SYS_execve, target, argv, none, 0UL, 0UL);
}
static int act_exec_file(void) {
    char * const argv[] = { "sh", "-c", "echo ok 0", NULL };
    char * const none[] = { NULL };
    const int fd = open(target, O_RDONLY);
    return fd < 0 ? -1 : (int) syscall(SYS_execveat, fd, "", argv, none, AT_EMPTY_PATH);
}
static int act_fork(void) {
    const pid_t child = fork();
    if (child == 0) {
        _exit(0);
    }
    return child < 0 ? -1 : waitpid(child, NULL, 0);
}
static void * nothing(void * argument) { return argument; }
static int act_thread(void) {
    pthread_t thread;
    errno = pthread_create(&thread, NULL, nothing, NULL);
    return errno != 0 ? -1 : pthread_join(thread, NULL);
}

static int act_signal(void) { return kill(atoi(target), 0); }
static int act_signal_self(void) { return kill(getpid(), 0); }
static int act_ptrace(void) {
    const pid_t victim = atoi(target);
    if (ptrace(PTRACE_ATTACH, victim, NULL, NULL) != 0) {
        return -1;
    }
    waitpid(victim, NULL, __WALL);
    return (int) ptrace(PTRACE_DETACH, victim, NULL, NULL);
}
static int act_io_uring(void) {
    char parameters[120] = { 0 };
    return (int) syscall(SYS_io_uring_setup, 1, parameters);
}
static int act_own_signal_to(void) {
    int pair[2];
    return socketpair(AF_UNIX, SOCK_STREAM, 0, pair) != 0 ? -1 : fcntl(pair[0], F_SETOWN, atoi(target));
}
static int act_limit_other(void) {
    unsigned long limit[2];
    return (int) syscall(SYS_prlimit64, atoi(target), 7 /* RLIMIT_NOFILE */, NULL, limit);
}
static int act_raise_privileges(void) { // what a setuid program would have gained
    if (prctl(PR_GET_NO_NEW_PRIVS, 0, 0, 0, 0) == 1) {
        errno = EPERM;
        return -1;
    }
    return 0;
}
static int act_keep_capability(void) { // 1: anything but reading past modes is left to root
    for (int capability = 0; prctl(PR_CAPBSET_READ, capability, 0, 0, 0) >= 0; ++capability) {
        if (capability != 2 && prctl(PR_CAPBSET_READ, capability, 0, 0, 0) == 1) {
            return 0;
        }
    }
    errno = EPERM;
    return -1;
}
static int act_hog(void) { // TARGET MiB, written to
    const size_t size = (size_t) atoi(target) << 20;
    char * block = malloc(size);
    if (block == NULL) {
        return -1;
    }
    memset(block, 1, size);
    return block[size / 2] - 1;
}
static int mapped(int fd, int flags) { // TARGET MiB, touched in two places
    const size_t size = (size_t) atoi(target) << 20;
    char * block = mmap(NULL, size, PROT_READ | PROT_WRITE, flags | MAP_NORESERVE, fd, 0);
    if (block == MAP_FAILED) {
        return -1;
    }
    block[0] = block[size / 2] = 1;
    return block[size / 2] - 1;
}
static int act_hog_shared(void) { return mapped(-1, MAP_SHARED | MAP_ANONYMOUS); }
static int act_hog_stack(void)  { return mapped(-1, MAP_PRIVATE | MAP_ANONYMOUS | MAP_GROWSDOWN); }
static int act_hog_zero(void)   { return mapped(open("/dev/zero", O_RDWR), MAP_SHARED); }
static int act_count_open(void) {
    int count = 0;
    for (int fd = 0; fd < 1024; ++fd) {
        count += fcntl(fd, F_GETFD) >= 0;
    }
    return count;
}

static const struct {
    const char * name;
    int (*act)(void);
} actions[] = {
    { "read", act_read }, { "write", act_write }, { "make", act_make }, { "cut", act_cut },
    { "truncate", act_truncate }, { "chmod", act_chmod }, { "remove", act_remove },
    { "list", act_list }, { "tcp", act_tcp }, { "udp", act_udp }, { "netlink", act_netlink },
    { "connect", act_connect }, { "datagram", act_datagram }, { "listen", act_listen },
    { "exec", act_exec }, { "exec-guess", act_exec_guess }, { "exec-file", act_exec_file },
    { "fork", act_fork }, { "thread", act_thread }, { "signal", act_signal },
    { "signal-self", act_signal_self }, { "ptrace", act_ptrace }, { "io-uring", act_io_uring },
    { "own-signal", act_own_signal_to }, { "limit-other", act_limit_other },
    { "raise-privileges", act_raise_privileges }, { "keep-capability", act_keep_capability },
    { "hog", act_hog }, { "hog-shared", act_hog_shared }, { "hog-stack", act_hog_stack },
    { "hog-zero", act_hog_zero }, { "count-open", act_count_open },
};

int main(int argc, char ** argv) {
    if (argc != 3) {
        return 2;
    }
    target = argv[2];
    for (size_t i = 0; i < sizeof(actions) / sizeof(actions[0]); ++i) {
        if (strcmp(argv[1], actions[i].name) == 0) {
            const int result = actions[i].act();
            printf(result < 0 ? "refused %d\n" : "ok %d\n", result < 0 ? errno : result);
            return 0;
        }
    }
    return 2;
}
